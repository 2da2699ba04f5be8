"""Attention on this machine: PyTorch's fused call, plain matrix products, and what omniid picks. Forward and backward."""

import torch
import torch.nn.functional as F
from harness import report, time_in_turn, training_dtype

from omniid.kernels.dense_attention import dense_attention, dense_attention_reference

# (batch, queries, keys, heads, head size): decoder self, decoder's last block, decoder cross, tower, FLUX at mini size;
# then the tower and the decoder at the paper's.
SHAPES = [
    (64, 256, 256, 3, 64),
    (64, 170, 256, 3, 64),
    (16, 308, 32, 3, 64),
    (33, 65, 65, 3, 64),
    (64, 96, 96, 3, 64),
    (3, 257, 257, 16, 80),
    (8, 256, 256, 16, 80),
]


def fused(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def setup(shape: tuple[int, ...]):
    """Cases over one set of inputs in the precision of training."""
    batch, queries, keys, heads, size = shape
    generator = torch.Generator().manual_seed(0)

    def make(length):
        return torch.randn(batch, length, heads, size, generator=generator).to(training_dtype()).requires_grad_()

    q, k, v, upstream = make(queries), make(keys), make(keys), make(queries).detach()

    def run(function):
        return lambda: torch.autograd.grad(function(q, k, v), (q, k, v), upstream)

    return {"fused": run(fused), "products": run(dense_attention_reference), "omniid": run(dense_attention)}


rows = []
for shape in SHAPES:
    times = time_in_turn(setup(shape), rounds=7)
    rows.append(
        {"B, Lq, Lk, H, D": shape, **{f"{name} ms": t["median_ms"] for name, t in times.items()}}
        | {"fused / omniid": times["fused"]["median_ms"] / times["omniid"]["median_ms"]}
    )
report(
    "dense_attention",
    rows,
    f"Forward and backward in {str(training_dtype())[6:]}, medians. The ratio says how much faster training's choice is "
    "than the fused call.",
)
