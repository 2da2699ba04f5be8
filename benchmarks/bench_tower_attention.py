"""Self-attention of the vision tower over its 257 tokens: PyTorch's backends, read from one packed projection.

What a kernel of our own would have to beat before it is kept, and the floor of memory and products that none can. Forward,
and forward with backward; every case in the same process, in turn. On a GPU in bf16 at the paper's sizes, without one in fp32
at mini's and at one photo of the paper's.
"""

import torch
import torch.nn.functional as F
from harness import report, time_in_turn
from torch.nn.attention import SDPBackend, sdpa_kernel

from omniid.train.hardware import GPUS

# (photos, tokens, heads, head size): mini's tower, then the paper's.
SHAPES = [(33, 65, 3, 64), (1, 257, 16, 80)]
GPU_SHAPES = [(n, 257, 16, 80) for n in (1, 8, 24, 96, 256)]
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def attention(qkv: torch.Tensor, function) -> torch.Tensor:
    """(N, L, H D), as the output projection reads it, of packed (N, L, 3, H, D)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return function(q, k, v).transpose(1, 2).flatten(2)


def with_backend(backend: SDPBackend):
    def function(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return function


def functions() -> dict:
    """What attends, by name: those that this machine may have. cuDNN's attention needs a GPU, FlexAttention a compiler."""
    names = BACKENDS if DEVICE == "cuda" else [name for name in BACKENDS if name != "cudnn"]
    cases = {name: with_backend(BACKENDS[name]) for name in names}
    if DEVICE == "cuda":
        from torch.nn.attention.flex_attention import flex_attention

        cases["flex"] = torch.compile(flex_attention)
    return cases


def setup(shape: tuple[int, ...], training: bool) -> dict:
    """Cases over one packed projection."""
    photos, tokens, heads, size = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(photos, tokens, 3, heads, size, generator=generator).to(DEVICE, DTYPE).requires_grad_(training)
    upstream = torch.randn(photos, tokens, heads * size, generator=generator).to(DEVICE, DTYPE)

    def run(function):
        if training:
            return lambda: torch.autograd.grad(attention(qkv, function), qkv, upstream)
        return lambda: attention(qkv, function)

    return {name: run(function) for name, function in functions().items()}


def floor_ms(shape: tuple[int, ...], training: bool) -> float | None:
    """The longer of products at the data sheet's rate and of reading q, k, v and writing the output once; None for a CPU or a
    GPU that is not known."""
    name = torch.cuda.get_device_name().lower().replace(" ", "") if DEVICE == "cuda" else ""
    card = next((card for key, card in GPUS.items() if key in name), None)
    if card is None:
        return None
    photos, tokens, heads, size = shape
    products, numbers = 4 * photos * heads * tokens**2 * size, 4 * photos * tokens * heads * size
    # Backward: five products to the forward's two, and the same tensors once more with their gradients.
    flops, moved = (3.5 * products, 3 * numbers) if training else (products, numbers)
    return 1e3 * max(flops / card.bf16_flops, moved * DTYPE.itemsize / card.memory_bytes_per_s)


def main():
    rows = []
    for shape in GPU_SHAPES if DEVICE == "cuda" else SHAPES:
        products = 4 * shape[0] * shape[2] * shape[1] ** 2 * shape[3]
        for training in (False, True):
            with torch.set_grad_enabled(training):
                times = time_in_turn(setup(shape, training), rounds=25 if DEVICE == "cuda" else 7)
            medians = {name: t["median_ms"] for name, t in times.items()}
            floor = floor_ms(shape, training)
            rows.append(
                {"N, L, H, D": shape, "dtype": str(DTYPE)[6:], "pass": "with backward" if training else "inference"}
                | {f"{name} ms": time for name, time in medians.items()}
                | {f"{name} 20-80 %": f"{t['p20_ms']}-{t['p80_ms']}" for name, t in times.items()}
                | {f"{name} TFLOP/s": (3.5 if training else 1) * products / t / 1e9 for name, t in medians.items()}
                | ({} if floor is None else {"floor ms": floor, "floor / best": floor / min(medians.values())})
            )
    report(
        "tower_attention",
        rows,
        "Medians. All read one packed projection and write rows as the output projection reads them. The floor is the longer of "
        "the products at the data sheet's rate for this dtype and of one pass over the memory.",
    )


if __name__ == "__main__":
    main()
