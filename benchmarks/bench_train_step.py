"""One training step of stage mtd, forward, backward and optimizer: identities a second of four forms of the same model.

    padded eager     plain PyTorch: photo sets filled up to the largest and masked, every row of every target decoded
    packed eager     the same with packed photo sets: each identity's queries read its own photos, nothing is filled up
    packed compiled  packed eager with torch.compile on every block
    omniid           what `omniid train mtd` runs
    omniid fp8       the same with train.mtd.fp8, on GPUs that multiply fp8

All have the same weights, batch and visible patches; their losses and gradients are compared before anything is timed.
"""

import contextlib
import copy
import dataclasses
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import DEVICE, command_line, report, time_in_turn
from torch import Tensor, nn

from omniid.config import ConfigError, Preset, load_preset
from omniid.data.few_to_many import Batch
from omniid.kernels.fp8_rows import FIRST_WITH_FP8
from omniid.kernels.patch_l1 import patch_l1_reference
from omniid.models.fp8 import train_in_fp8
from omniid.models.masked_decoder import patchify
from omniid.train.draws import identity_generators
from omniid.train.mtd import MTDStage
from omniid.train.optimizer import build_optimizer
from omniid.train.precision import choose_precision

SEED, MOST_PHOTOS = 0, 3
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Relative, of losses and gradient norms."""
FP8_TOLERANCE = 0.1


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (B, Lq, H, D), k and v (B, Lk, H, D), mask bool over (B, H, Lq, Lk), to (B, Lq, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def cross_block(block: nn.Module, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
    """A block of queries (B, N, C) over a context (B, S, C_context) with keys that count where `mask`."""
    return block.finish(x, plain_attention(block.queries(x), *block.keys_values(context), mask))


def self_block(block: nn.Module, x: Tensor) -> Tensor:
    normed = block.norm_attention(x)
    return block.finish(x, plain_attention(block.queries(normed), *block.keys_values(normed)))


def tower_layer(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, None)


class PlainMTD:
    """The peers: the stage's own modules and weights, put together in plain PyTorch."""

    def __init__(self, stage: MTDStage, *, is_padded: bool, is_compiled: bool):
        self.encoder, self.decoder, self.is_padded = stage.encoder, stage.decoder, is_padded
        self.vision = getattr(stage.encoder.tower, "vision_model", stage.encoder.tower)
        wrap = torch.compile if is_compiled else lambda function: function
        self.cross_block, self.self_block, self.tower_layer = map(wrap, (cross_block, self_block, tower_layer))
        self.keys_values = wrap(lambda block, context: block.keys_values(context))
        self.queries = wrap(lambda block, x: block.queries(x))
        self.finish = wrap(lambda block, x, attended: block.finish(x, attended))

    def loss(self, batch: Batch, visible: Tensor) -> Tensor:
        codes = self._padded_codes(batch) if self.is_padded else self._packed_codes(batch)
        return self._decoded_loss(codes, batch, visible)

    def _photo_tokens(self, images: Tensor) -> Tensor:
        x = images * self.encoder.image_gain + self.encoder.image_shift
        x = self.vision.pre_layrnorm(self.vision.embeddings(x))
        with using_attention(self.vision, "sdpa"):
            for layer in self.vision.encoder.layers:
                x = self.tower_layer(layer, x)
        return self.vision.post_layernorm(x)  # (N, L_x, C_tower)

    def _padded_codes(self, batch: Batch) -> Tensor:
        """The tower runs on empty photos too, and their tokens are masked."""
        counts = batch.cu_inputs.diff().tolist()
        images = nn.utils.rnn.pad_sequence(batch.inputs.split(counts), batch_first=True)  # (B, M, 3, H, W)
        tokens = self._photo_tokens(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        exists = torch.arange(images.shape[1], device=images.device) < batch.cu_inputs.diff().unsqueeze(1)  # (B, M)
        mask = exists.repeat_interleave(tokens.shape[2], dim=1)[:, None, None]  # (B, 1, 1, M * L_x)
        x = self.encoder.queries.expand(len(counts), -1, -1)
        for block in self.encoder.cross_blocks:
            x = self.cross_block(block, x, tokens.flatten(1, 2), mask)
        return self._finish_codes(x)

    def _packed_codes(self, batch: Batch) -> Tensor:
        tokens = self._photo_tokens(batch.inputs)
        bounds = (batch.cu_inputs * tokens.shape[1]).tolist()
        x = self.encoder.queries.expand(len(bounds) - 1, -1, -1)
        for block in self.encoder.cross_blocks:
            keys, values = self.keys_values(block, tokens.flatten(0, 1))
            queries = self.queries(block, x)
            pieces = [
                plain_attention(queries[b : b + 1], keys[None, start:end], values[None, start:end])
                for b, (start, end) in enumerate(pairwise(bounds))
            ]
            x = self.finish(block, x, torch.cat(pieces))
        return self._finish_codes(x)

    def _finish_codes(self, x: Tensor) -> Tensor:
        for block in self.encoder.self_blocks:
            x = self.self_block(block, x)
        return self.encoder.norm(x)

    def _decoded_loss(self, codes: Tensor, batch: Batch, visible: Tensor) -> Tensor:
        decoder, size = self.decoder, self.decoder.config.patch_size
        pixels = patchify(batch.targets, size)  # (B, T, N, P)
        face = patchify(batch.masks.unsqueeze(2).expand(-1, -1, 3, -1, -1), size)
        shown = torch.zeros_like(pixels[..., :1], dtype=torch.bool).scatter_(2, visible.unsqueeze(-1), True)
        x = torch.where(shown, decoder.embed(pixels), decoder.mask_token) + decoder.position
        x = x.flatten(1, 2)  # (B, T * N, C)
        for block in decoder.cross_blocks:
            x = self.cross_block(block, x, codes)
        x = x.unflatten(1, pixels.shape[1:3]).flatten(0, 1)  # (B * T, N, C)
        for block in decoder.self_blocks:
            x = self.self_block(block, x)
        hidden, pixels, face = decoder.norm(x).flatten(0, 1), pixels.flatten(0, 2), face.flatten(0, 2)
        return patch_l1_reference(hidden, decoder.head.weight, decoder.head.bias, pixels, face)


@contextlib.contextmanager
def using_attention(vision: nn.Module, name: str):
    """The tower's layers with another of transformers' attention functions."""
    kept, vision.config._attn_implementation = vision.config._attn_implementation, name
    try:
        yield
    finally:
        vision.config._attn_implementation = kept


def random_batch(preset: Preset, num_identities: int, device: str) -> Batch:
    """1, 2, 3, 1, ... photos of each identity; faces are ellipses over 45 % of a target."""
    generator = torch.Generator().manual_seed(SEED)
    counts = torch.arange(num_identities) % MOST_PHOTOS + 1
    size, num_targets = preset.decoder.image_size, preset.train.mtd.num_targets
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    ellipse = (x / 0.68) ** 2 + (y / 0.84) ** 2 <= 1
    inputs = torch.rand(int(counts.sum()), 3, size, size, generator=generator) * 2 - 1
    targets = torch.rand(num_identities, num_targets, 3, size, size, generator=generator) * 2 - 1
    return Batch(
        inputs=inputs.to(device),
        cu_inputs=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int().to(device),
        targets=targets.to(device),
        masks=ellipse.expand(num_identities, num_targets, -1, -1).contiguous().to(device),
        captions=[],
        identity_ids=[],
        places=list(range(num_identities)),
        skipped=[],
    )


def setup(preset: Preset, num_identities: int, device: str, dtype: torch.dtype) -> dict[str, Callable[[], tuple]]:
    """A training step for each form; it returns loss and gradient norm as tensors."""
    torch.manual_seed(SEED)
    stage = MTDStage(preset)
    stage.model.to(device).train()
    batch = random_batch(preset, num_identities, device)
    generators = identity_generators(SEED, batch.places)
    visible = torch.cat([stage.decoder.draw_visible(1, batch.targets.shape[1], one) for one in generators]).to(device)
    forms = {
        "padded eager": PlainMTD(stage, is_padded=True, is_compiled=False),
        "packed eager": PlainMTD(stage, is_padded=False, is_compiled=False),
        "packed compiled": PlainMTD(stage, is_padded=False, is_compiled=True),
    }

    losses = {name: lambda form=form: form.loss(batch, visible) for name, form in forms.items()}
    losses["omniid"] = lambda: stage.loss(batch, identity_generators(SEED, batch.places))[0]

    def steps(stage: MTDStage, losses: dict[str, Callable[[], Tensor]]) -> dict[str, Callable[[], tuple]]:
        # One set of weights for all; at a rate of 0 it stays as it is, in the same time.
        optimizer = build_optimizer(stage, dataclasses.replace(preset.train.mtd, lr=0.0))
        parameters = list(stage.model.parameters())

        def step(loss_of: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
            def run():
                with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                    loss = loss_of()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(parameters, preset.train.mtd.grad_clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                return loss.detach(), norm

            return run

        return {name: step(loss_of) for name, loss_of in losses.items()}

    cases = steps(stage, losses)
    if device == "cuda" and torch.cuda.get_device_capability() >= FIRST_WITH_FP8:
        in_fp8 = copy.deepcopy(stage)
        train_in_fp8(in_fp8.model)
        cases |= steps(in_fp8, {"omniid fp8": lambda: in_fp8.loss(batch, identity_generators(SEED, batch.places))[0]})
    return cases


def check(cases: dict[str, Callable[[], tuple]], dtype: torch.dtype) -> dict[str, float]:
    """Runs every form once and returns how far its loss is from ours, relative; ends where forms disagree."""
    found = {name: [float(value) for value in case()] for name, case in cases.items()}
    for name, values in found.items():
        tolerance = FP8_TOLERANCE if name.endswith("fp8") else TOLERANCE[dtype]
        for what, value, ours in zip(("loss", "gradient norm"), values, found["omniid"], strict=True):
            if not abs(value - ours) <= tolerance * abs(ours):
                raise SystemExit(f"{name}: {what} {value}, omniid's {ours}; times of other work tell nothing")
    return {name: abs(values[0] / found["omniid"][0] - 1) for name, values in found.items()}


parser = command_line()
parser.add_argument("--preset", default="mini", help="mini, paper or a TOML file; weights are random")
parser.add_argument("--device", default=DEVICE, choices=["cpu", "cuda"])
parser.add_argument("--identities", type=int, help="of a step; default: 16 at mini, else 32")
parser.add_argument("--rounds", type=int, default=5)
options = parser.parse_args()
theme = "train_step" if options.preset == "mini" else f"train_step_{Path(options.preset).stem}"
if options.device == "cuda" and not torch.cuda.is_available():
    print(f"{theme}: not measured, for --device cuda needs a GPU and a CUDA build of torch")
    print(json.dumps({"theme": theme, "rows": [], "not measured": "no CUDA device"}))
    sys.exit()
try:
    preset = load_preset(options.preset)
except ConfigError as error:
    parser.error(str(error))
preset = dataclasses.replace(preset, tower=dataclasses.replace(preset.tower, pretrained=""))
num_identities = options.identities or (16 if options.preset == "mini" else 32)
dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[choose_precision("auto", options.device == "cpu")]
torch._dynamo.config.recompile_limit = 64  # blocks of several widths share a function
cases = setup(preset, num_identities, options.device, dtype)
differences = check(cases, dtype)
times = time_in_turn(cases, rounds=options.rounds, warmup=1)
eager = times["packed eager"]["median_ms"]
rows = [
    {"form": name, "identities/s": num_identities / t["median_ms"] * 1e3, **t}
    | {"packed eager / this": eager / t["median_ms"], "loss differs by": differences[name]}
    for name, t in times.items()
]
report(
    theme,
    rows,
    f"Preset {preset.name} with random weights on {options.device} in {str(dtype).removeprefix('torch.')}, {num_identities} "
    f"identities with 1 to {MOST_PHOTOS} photos and {preset.train.mtd.num_targets} targets a step. Times in ms of forward, "
    "backward, clipping and AdamW; the compiled form's compilation is not among them, nor are other shapes, for which it would "
    "compile again. Loss: relative to omniid's. Target at mini on two cores: 1.6 times packed eager.",
    parser,
)
