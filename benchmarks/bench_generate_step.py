"""One step of a FLUX transformer at its full size: alone, with an identity in every block, and as others read identities.

Weights are random and the same for every form: time does not depend on what was learned. `without cache` projects the
identity's keys and values anew in every step and adds to a copy of the output; `diffusers' own` is the IP-Adapter processor of
the installed diffusers (double blocks only, keys and values projected in every step). `compiled`, `blocks compiled` and `in CUDA
graphs` are `omniid generate --compile` with default, blocks and reduce-overhead. Compiling is in the first call alone; it starts
from no cache. `fp8` rounds the linear layers of all blocks once (`freeze_in_fp8`).
"""

from collections.abc import Callable
from time import perf_counter

import torch
import torch._inductor.config
from harness import DEVICE, command_line, end_without_inputs, report, time_in_turn
from identity_forms import added_out_of_place, attach_ip_adapter
from torch import Tensor, nn

from omniid.config import ConfigError, load_preset
from omniid.errors import OmniIDError
from omniid.generate.compilation import compile_transformer
from omniid.models.flux import PIXELS_PER_TOKEN, TextEmbedding, base_without_weights, layout_of, predict_velocity
from omniid.models.fp8 import check_fp8_device, freeze_in_fp8
from omniid.models.identity_adapter import IdentityAdapter, IdentityUse, attach_identities

SEED = 0
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15}
"""Relative, of the velocity: narrow values are rounded anew in each of up to 57 blocks; wrong ones err by about 1 (assumed)."""
FP8_TOLERANCE = 0.5

parser = command_line()
parser.add_argument("--preset", default="paper", help="whose base: paper (FLUX.1-dev), mini or a TOML file")
parser.add_argument("--device", default=DEVICE, choices=["cpu", "cuda"])
parser.add_argument("--image-size", type=int, default=1024, help="pixels, a multiple of 16")
parser.add_argument("--double-blocks", type=int, help="instead of all that the base has; so are single blocks")
parser.add_argument("--single-blocks", type=int)
parser.add_argument("--fp8", action="store_true", help="forms in fp8 too")
parser.add_argument("--compile", action="store_true", help="compiled forms too; compiling takes minutes")
parser.add_argument("--rounds", type=int, default=5)
arguments = parser.parse_args()
device = arguments.device
if device == "cuda" and not torch.cuda.is_available():
    end_without_inputs("--device cuda needs a GPU and a CUDA build of torch")
if arguments.image_size < 1 or arguments.image_size % PIXELS_PER_TOKEN:
    parser.error(f"--image-size must be a multiple of {PIXELS_PER_TOKEN}, got {arguments.image_size}")
if device == "cpu" and arguments.preset == "paper" and None in (arguments.double_blocks, arguments.single_blocks):
    end_without_inputs(
        "all blocks of FLUX.1-dev want a GPU; take few (--double-blocks 1 --single-blocks 1) or --preset mini"
    )
try:
    preset = load_preset(arguments.preset)
    if arguments.fp8:
        check_fp8_device(device)
except (ConfigError, OmniIDError) as error:
    parser.error(str(error))
dtype = torch.bfloat16 if device == "cuda" else torch.float32
generator = torch.Generator(device).manual_seed(SEED)


def draw(*shape: int, deviation: float = 1.0) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device).normal_(0, deviation, generator=generator)


def build(weights: dict[str, Tensor] | None = None) -> nn.Module:
    """A transformer around `weights`, which it shares with others, or around random ones that keep activations near one."""
    transformer, _ = base_without_weights(preset.base)
    numbers = {"num_layers": arguments.double_blocks, "num_single_layers": arguments.single_blocks}
    numbers = {name: number for name, number in numbers.items() if number is not None}
    with torch.device("meta"):
        transformer = type(transformer).from_config(transformer.config, **numbers)
    if weights is None:
        weights = {
            name: draw(*weight.shape, deviation=weight.shape[-1] ** -0.5)
            if weight.dim() > 1
            else torch.full(weight.shape, float(name.endswith("weight")), dtype=dtype, device=device)
            for name, weight in transformer.state_dict().items()
        }
    transformer.load_state_dict(weights, assign=True)
    return transformer.eval().requires_grad_(False)


base = build()
layout = layout_of(base)
adapter = IdentityAdapter.for_transformer(base, preset.encoder.width).requires_grad_(False).to(device, dtype)
for to_v in adapter.to_v_id:  # zeros before training, with which all forms would agree
    to_v.weight.normal_(0, preset.encoder.width**-0.5)
tokens = draw(1, preset.encoder.num_queries, preset.encoder.width)
latents = draw(1, base.config.in_channels // 4, arguments.image_size // 8, arguments.image_size // 8)
text = TextEmbedding(
    draw(1, preset.base.max_sequence_length, base.config.joint_attention_dim),
    draw(1, base.config.pooled_projection_dim),
)
time, guidance = torch.full((1,), 0.7, device=device), torch.full((1,), preset.base.guidance_scale, device=device)


@torch.inference_mode()
def step(transformer: nn.Module) -> Tensor:
    return predict_velocity(transformer, latents, time, text, guidance)


def with_identity(transformer: nn.Module) -> Callable[[], Tensor]:
    cached = adapter.project(tokens)

    def run() -> Tensor:
        with attach_identities(transformer, [IdentityUse(cached)]):
            return step(transformer)

    return run


def without_cache() -> Tensor:
    """Keys and values for every step, and a sum that is a new tensor."""
    with added_out_of_place():
        return with_identity(base)()


def diffusers_own() -> Callable[[], Tensor]:
    """A transformer like the others', with random IP-Adapter layers in its double blocks."""
    own = build(base.state_dict())
    attach_ip_adapter(own, preset.encoder.width, tokens.shape[1])

    def give_tokens(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"joint_attention_kwargs": {"ip_hidden_states": [tokens]}}

    own.register_forward_pre_hook(give_tokens, with_kwargs=True)
    return lambda: step(own)


def forms(suffix: str, transformer: nn.Module) -> dict[str, Callable[[], Tensor]]:
    return {"base" + suffix: lambda: step(transformer), "with identity" + suffix: with_identity(transformer)}


COMPILATIONS = {", compiled": "default", ", blocks compiled": "blocks"}
if device == "cuda":
    COMPILATIONS[", in CUDA graphs"] = "reduce-overhead"


cases = forms("", base) | {
    "with identity, unfused, without cache": without_cache,
    "diffusers' own, double blocks only": diffusers_own(),
}
own_base = dict.fromkeys(cases, "base")
for precision in ["", ", fp8"] if arguments.fp8 else [""]:
    for compilation in ["", *COMPILATIONS] if arguments.compile else [""]:
        if not (suffix := precision + compilation):
            continue
        transformer = build(base.state_dict())
        if precision:
            freeze_in_fp8(transformer)
        if compilation:
            compile_transformer(transformer, COMPILATIONS[compilation])
        more = forms(suffix, transformer)
        cases, own_base = cases | more, own_base | dict.fromkeys(more, "base" + suffix)

torch._inductor.config.force_disable_caches = True
drawn, first_seconds, differences = {}, {}, {}
for name, case in cases.items():
    start = perf_counter()
    drawn[name] = case().float().cpu()
    first_seconds[name] = perf_counter() - start
for name, velocity in drawn.items():
    exact = drawn["base" if name.startswith("base") else "with identity"]
    differences[name] = float((velocity - exact).norm() / exact.norm())
    tolerance = FP8_TOLERANCE if "fp8" in name else TOLERANCE[dtype]
    if not name.startswith("diffusers") and not differences[name] <= tolerance:
        raise SystemExit(
            f"{name} differs by {differences[name]:.2g} from the eager form; times of other work tell nothing"
        )
differences["diffusers' own, double blocks only"] = ""  # random layers of its own
times = time_in_turn(cases, rounds=arguments.rounds, warmup=2)
rows = [
    {"form": name, **t}
    | {"of its base": t["median_ms"] / times[own_base[name]]["median_ms"]}
    | {"of base": t["median_ms"] / times["base"]["median_ms"], "differs by": differences[name]}
    | {"first call s": first_seconds[name]}
    for name, t in times.items()
]
report(
    "generate_step" if arguments.preset == "paper" else f"generate_step_{preset.name}",
    rows,
    f"Preset {preset.name} on {device} in {str(dtype).removeprefix('torch.')}: {layout.num_double_blocks} double and "
    f"{layout.num_single_blocks} single blocks of {layout.num_heads} heads, {arguments.image_size} px, "
    f"{preset.base.max_sequence_length} text and {tokens.shape[1]} identity tokens, one picture. Differences are relative, from "
    "the eager form in the widest precision. Targets at 1024 px: with identity at most 1.02 of its base, fp8 at most 1 / 1.3.",
    parser,
)
