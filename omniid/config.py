"""Presets: dataclasses that hold every size and rate, read from TOML.

A preset is a file, never a branch: `mini` and `paper` run the same code. Unknown keys are errors that name the
nearest known key; values that cannot work together are refused when the dataclass is made.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

PRESET_FOLDER = Path(__file__).parent / "presets"


class ConfigError(ValueError):
    """A preset file or an override that cannot be used; the text says which key and what would be right."""


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise ConfigError(text)


@dataclass(kw_only=True, slots=True, frozen=True)
class TowerConfig:
    """Vision tower: the sizes of a transformers `CLIPVisionModel`."""

    image_size: int
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    activation: str = "gelu"
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean and standard deviation of RGB in 0..1 that the tower was trained with."""
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pretrained: str = ""
    """Hub name or folder of CLIP weights to start training from; empty starts from random weights."""

    def __post_init__(self) -> None:
        _require(
            self.image_size % self.patch_size == 0,
            f"tower.image_size {self.image_size} is not a multiple of tower.patch_size {self.patch_size}",
        )
        _require(
            self.width % self.num_heads == 0,
            f"tower.width {self.width} is not a multiple of tower.num_heads {self.num_heads}",
        )

    @property
    def num_tokens(self) -> int:
        """L_x: patches and one class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(kw_only=True, slots=True, frozen=True)
class EncoderConfig:
    """Set encoder: learnable queries, cross-attention to all photos' tokens, then self-attention (Sec. 4.1)."""

    num_queries: int
    """L, rows of the identity code."""
    width: int
    """C, columns of the identity code."""
    num_heads: int
    num_cross_blocks: int = 2
    num_self_blocks: int = 2
    mlp_ratio: float = 4.0
    kind: str = "omniid"
    """What makes the code: omniid, or a baseline (`omniid.baselines`): arcface, clip, arcface_clip or mean."""
    recogniser: str = "offline"
    """Kinds arcface and arcface_clip only: the face backend whose recogniser they are made of."""

    def __post_init__(self) -> None:
        kinds = ("omniid", "arcface", "clip", "arcface_clip", "mean")
        _require(self.kind in kinds, f"encoder.kind must be one of {', '.join(kinds)}, got {self.kind!r}")
        _require(
            self.width % self.num_heads == 0,
            f"encoder.width {self.width} is not a multiple of encoder.num_heads {self.num_heads}",
        )


@dataclass(kw_only=True, slots=True, frozen=True)
class DecoderConfig:
    """Masked transformer decoder (Sec. 3.3): the encoder's architecture with a masked target's tokens as queries."""

    image_size: int
    patch_size: int
    width: int
    num_heads: int
    num_cross_blocks: int = 2
    num_self_blocks: int = 2
    mlp_ratio: float = 4.0
    mask_ratio: float = 0.95

    def __post_init__(self) -> None:
        _require(
            self.image_size % self.patch_size == 0,
            f"decoder.image_size {self.image_size} is not a multiple of decoder.patch_size {self.patch_size}",
        )
        _require(
            self.width % self.num_heads == 0,
            f"decoder.width {self.width} is not a multiple of decoder.num_heads {self.num_heads}",
        )
        _require(0.0 < self.mask_ratio < 1.0, f"decoder.mask_ratio must lie between 0 and 1, got {self.mask_ratio}")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_visible(self) -> int:
        """Patches of a target that stay visible (13 of 256 at a mask ratio of 0.95)."""
        return max(1, round(self.num_patches * (1.0 - self.mask_ratio)))


@dataclass(kw_only=True, slots=True, frozen=True)
class BaseSizes:
    """Sizes of a small FLUX made by `omniid train base`; a hub base brings its own."""

    num_double_blocks: int
    num_single_blocks: int
    num_heads: int
    head_dim: int
    axes_dims: tuple[int, int, int]
    t5_width: int
    t5_layers: int
    t5_heads: int
    clip_width: int
    clip_layers: int
    clip_heads: int
    latent_channels: int = 16
    vae_channels: tuple[int, ...] = (48, 48, 48, 48)

    def __post_init__(self) -> None:
        _require(
            sum(self.axes_dims) == self.head_dim,
            f"base.sizes.axes_dims {self.axes_dims} must sum to head_dim {self.head_dim}",
        )


@dataclass(kw_only=True, slots=True, frozen=True)
class BaseConfig:
    """The FLUX pipeline that draws: a diffusers folder or hub name."""

    path: str
    """Folder or hub name of a diffusers FluxPipeline; "embedded" is the folder shipped inside the package."""
    image_size: int
    """Width and height in pixels of training targets and of generated images by default."""
    max_sequence_length: int
    """T5 tokens of a prompt."""
    num_inference_steps: int
    guidance_scale: float
    id_guidance: float = 1.0
    """How many times what an identity changes is taken when generating; other than 1 costs twice the time."""
    joint_guidance: bool = False
    """Whether it is taken of what identity, prompt and landmarks change together."""
    noise_scale: float = 1.0
    """Scale of the noise that pictures are drawn from; below 1 less varied, smoother."""
    landmark_scale: float = 1.0
    """Strength of landmarks and poses; joint guidance takes it `id_guidance` times."""
    prompt: str = "photo of a person."
    """The fixed prompt y of the flow-matching stage (Sec. 3.3)."""
    sizes: BaseSizes | None = None

    def __post_init__(self) -> None:
        _require(0 < self.noise_scale < math.inf, f"base.noise_scale must be above 0, got {self.noise_scale}")


@dataclass(kw_only=True, slots=True, frozen=True)
class StageConfig:
    """One training stage. Rates are pure functions of the step."""

    steps: int
    batch_identities: int
    """Identities of a global step, over all processes and micro-batches."""
    tokens_per_batch: int = 0
    """Other than 0: a step takes as many identities as these vision tower tokens of their inputs pay for on average, over
    all processes and micro-batches; batch_identities then only bounds the validation batch."""
    accumulation: int = 1
    """Micro-batches of a step, one after another: less memory, the same gradient."""
    memory: str = "auto"
    """What the backward pass computes again instead of keeping it: none, selective, full, or auto: what fits the GPU."""
    compile: bool = False
    """torch.compile of every transformer block, for GPUs; it takes minutes at first, and two AVX2 cores gain nothing."""
    compile_mode: str = "default"
    """With `compile`: default, or reduce-overhead, which replays every compiled block as a CUDA graph. That is for batches
    so small that a GPU waits for its next kernel; no report says yet where it pays."""
    fp8: bool = False
    """Linear layers of all transformer blocks multiply in fp8, trained ones and a frozen base's; needs a GPU of compute
    capability 8.9 to gain. Norms, modulations, embeddings and heads stay as they are."""
    sharding: str = "none"
    """none: every process holds all weights and optimizer state (DDP); fsdp2: they are spread over the processes."""
    num_targets: int = 8
    """|X^r|, photos reconstructed per identity (Eq. 3)."""
    num_inputs: tuple[int, int] = (1, 3)
    """|X^s| is drawn uniformly from this closed range (Eq. 2)."""
    num_validation_inputs: int = 3
    reconstruct_inputs: bool = False
    """Targets are the input photos themselves, in their order: what Table 3 calls no few-to-many."""
    max_yaw: float = 90.0
    """Degrees: photos turned further are left out."""
    mirror: float = 0.0
    """Share of identities shown mirrored, all photos of a person together: a mirrored face is one more person."""
    optimizer: str = "adamw"
    """adamw, or adamw_8bit: bitsandbytes keeps its two averages in 8 bits each, a quarter of the memory; needs CUDA."""
    lr: float
    min_lr_ratio: float = 0.0
    """The cosine ends at lr * min_lr_ratio."""
    warmup_steps: int = 0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    precision: str = "auto"
    """fp32, bf16 for autocast, or auto: bf16 where the device multiplies it in hardware."""
    base_precision: str = "auto"
    """Flow, control and t2i stages: the frozen base's; auto is the precision of the run, nf4 holds its blocks in 4 bits."""
    timestep_sampling: str = "uniform"
    """Flow matching only: uniform (paper) or logit_normal."""
    timestep_shift: float = 1.0
    """Flow matching only: above 1 more noise, where it is settled who is drawn; 3 moves the middle of t from 0.5 to 0.75."""
    tower_lr_decay: float = 1.0
    """Mtd stage only: each layer of the vision tower gets this times the rate of the layer above it; 1 treats all alike."""
    encoder_lr_scale: float = 1.0
    """Mtd and flow stages only: the encoder's learning rate relative to the decoder's or adapter's; 0 freezes it and saves
    its backward."""
    cache_latents: bool = False
    """Flow, control and recogniser stages only: latents of all photos and the prompt's embedding are computed once and kept on
    disk; no step runs the autoencoder's encoder or reads target photos. Worth it where photos are seen many times."""
    cache_photos: bool = False
    """All stages but t2i: photos and masks are decoded once and kept on disk, 4 bytes a pixel, instead of decoding JPEGs in every
    step. Worth it where a fast GPU waits for small pictures; a photo with a damaged mask then counts as damaged."""
    cache_folder: str = ""
    """Where latents and photos are kept, for all runs that name it; empty means RUN/cache."""
    conditioning_dropout: float = 0.0
    """Base and t2i stages: share of captions replaced by the empty prompt; control stage: share of targets whose landmarks are
    kept from the ControlNet. Elsewhere without effect."""
    identity_share: float = 0.0
    """Base stage only: share of pictures that are also told who they show, by the code of stage `mtd` through an identity adapter
    that learns along. Not the paper's, whose base is large enough to be steered as it is; 0 leaves identities out."""
    control_double_blocks: int = 4
    control_single_blocks: int = 10
    """Control stage only: blocks of the landmark ControlNet. Not stated in the paper; diffusers' defaults for FLUX."""
    train_adapter: bool = True
    """Control stage only: whether the adapter learns too (Table 1's setting). Without, the ControlNet learns for the adapter as
    it is, which draws the same people as before where no landmarks are given."""
    keep_controlnet: bool = False
    """T2i stage only: a frozen landmark ControlNet tells the pose while training; pictures are drawn without it."""
    identity_loss_weight: float = 0.0
    """Flow, control and t2i stages, and base with `identity_share`: weight of the identity loss beside Eq. 7. Mtd stage: beside
    Eq. 5, of what a linear map reads from the codes, so that they tell people apart. 0 leaves it out, as the paper does."""
    identity_loss_pictures: int = 0
    """Targets that the identity loss looks at, of those that a process sees at once, each person's first before anybody's second;
    0 means all. A recogniser of pictures may cost more than the rest of a step."""
    identity_loss_temperature: float = 0.0
    """Above 0 the identity loss is the cross-entropy of finding a drawn face's own photo among those of the other people that a
    process sees at once, by cosines over this temperature, instead of 1 - cos."""
    identity_loss_steps: int = 0
    """The identity loss looks at what is drawn from noise alone, somewhere on the way of so many steps, and not at what is
    predicted from noisy photos, which show the person themselves. 0 leaves it at these."""
    landmark_loss_weight: float = 0.0
    """Control stage only: weight, beside Eq. 7, of how far the landmarks and angles of drawn faces are from those asked for. 0
    leaves it out, as the paper does."""
    landmark_loss_pictures: int = 0
    landmark_loss_steps: int = 0
    """As `identity_loss_pictures` and `identity_loss_steps`, of the landmark loss."""
    recogniser: str = ""
    """File of the recogniser for the identity loss: `recogniser.safetensors` of stage `recogniser`, which reads latents, or
    one of pictures, as `omniid export recogniser` makes from ONNX files."""
    autoencoder_steps: int = 0
    """Base stage only: steps of the autoencoder, trained before the transformer."""
    log_every: int = 20
    save_every: int = 500
    sample_every: int = 500
    keep_checkpoints: int = 2
    num_workers: int = 0
    """Worker processes of the data loader; 0 decodes in the training process."""
    max_bad_records: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.num_inputs
        _require(1 <= low <= high, f"num_inputs must be a range like [1, 3], got {list(self.num_inputs)}")
        blocks = self.control_double_blocks, self.control_single_blocks
        _require(min(blocks) >= 0 and sum(blocks) > 0, "the landmark ControlNet needs a block of some kind")
        _require(
            self.precision in ("auto", "fp32", "bf16"), f"precision must be auto, fp32 or bf16, got {self.precision!r}"
        )
        _require(
            self.base_precision in ("auto", "nf4"), f"base_precision must be auto or nf4, got {self.base_precision!r}"
        )
        _require(
            self.timestep_sampling in ("uniform", "logit_normal"),
            f"timestep_sampling must be uniform or logit_normal, got {self.timestep_sampling!r}",
        )
        _require(
            self.memory in ("auto", "none", "selective", "full"),
            f"memory must be auto, none, selective or full, got {self.memory!r}",
        )
        _require(
            self.compile_mode in ("default", "reduce-overhead"),
            f"compile_mode must be default or reduce-overhead, got {self.compile_mode!r}",
        )
        _require(
            self.compile or self.compile_mode == "default",
            "compile_mode is how blocks are compiled; set compile = true too, or leave it out",
        )
        _require(self.sharding in ("none", "fsdp2"), f"sharding must be none or fsdp2, got {self.sharding!r}")
        _require(
            0 < self.tower_lr_decay <= 1, f"tower_lr_decay must lie in 0..1, 0 excluded, got {self.tower_lr_decay}"
        )
        _require(
            self.optimizer in ("adamw", "adamw_8bit"), f"optimizer must be adamw or adamw_8bit, got {self.optimizer!r}"
        )
        _require(
            self.optimizer == "adamw" or self.sharding == "none",
            "optimizer adamw_8bit does not spread its state over processes; use it with sharding none",
        )
        _require(self.timestep_shift > 0, f"timestep_shift must be above 0, got {self.timestep_shift}")
        _require(0 <= self.identity_share <= 1, f"identity_share must lie in 0..1, got {self.identity_share}")
        _require(
            self.identity_loss_weight == 0 or self.recogniser != "",
            "identity_loss_weight needs a recogniser: the file that omniid train recogniser or omniid export recogniser made",
        )
        for name in ("identity_loss_pictures", "identity_loss_temperature", "identity_loss_steps"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
            _require(
                getattr(self, name) == 0 or self.identity_loss_weight > 0,
                f"{name} is about the identity loss; set identity_loss_weight too, or leave it out",
            )
        for name in ("landmark_loss_pictures", "landmark_loss_steps"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
            _require(
                getattr(self, name) == 0 or self.landmark_loss_weight > 0,
                f"{name} is about the landmark loss; set landmark_loss_weight too, or leave it out",
            )
        alone = self.tokens_per_batch == 0 and self.batch_identities < 2 * self.accumulation
        _require(
            self.identity_loss_temperature == 0 or not (alone or self.identity_loss_pictures == 1),
            "identity_loss_temperature compares people; at least 2 must be seen at once: see batch_identities, accumulation and "
            "identity_loss_pictures",
        )
        _require(self.tokens_per_batch >= 0, f"tokens_per_batch must not be negative, got {self.tokens_per_batch}")
        counts = ("steps", "batch_identities", "accumulation", "num_targets", "log_every", "save_every", "sample_every")
        for name in counts:
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _require(
            self.tokens_per_batch > 0 or self.batch_identities % self.accumulation == 0,
            f"batch_identities {self.batch_identities} is not a multiple of accumulation {self.accumulation}",
        )


@dataclass(kw_only=True, slots=True, frozen=True)
class TrainConfig:
    base: StageConfig
    mtd: StageConfig
    flow: StageConfig
    control: StageConfig | None = None
    """None in presets that were saved before this stage was there, as are the next."""
    t2i: StageConfig | None = None
    recogniser: StageConfig | None = None
    faces: StageConfig | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class Preset:
    """Everything that distinguishes a laptop from the paper."""

    name: str
    tower: TowerConfig
    encoder: EncoderConfig
    decoder: DecoderConfig
    base: BaseConfig
    train: TrainConfig = field(repr=False)


def load_preset(name_or_path: str | Path, overrides: typing.Sequence[str] = ()) -> Preset:
    """Reads preset `mini`, `paper` or a TOML file; `overrides` are `dotted.key=value` with TOML values.

    Raises ConfigError for an unknown preset, an unknown key (naming the nearest) or a value of the wrong type.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = PRESET_FOLDER / f"{name_or_path}.toml"
        if not path.is_file():
            known = sorted(p.stem for p in PRESET_FOLDER.glob("*.toml"))
            raise ConfigError(
                f"unknown preset {str(name_or_path)!r}; use one of {', '.join(known)} or a path that ends in .toml"
            )
    if not path.is_file():
        raise ConfigError(f"preset file {path} does not exist")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(table, override)
    return preset_from_dict(table)


def preset_from_dict(table: dict) -> Preset:
    return _build(Preset, table, "")


def preset_to_toml(preset: Preset) -> str:
    """The preset as TOML text that `load_preset` reads back to an equal object."""
    lines: list[str] = []

    def emit(table: dict, prefix: str) -> None:
        scalars = {k: v for k, v in table.items() if not isinstance(v, dict) and v is not None}
        if prefix:
            lines.append(f"\n[{prefix}]")
        lines.extend(f"{key} = {_toml_value(value)}" for key, value in scalars.items())
        for key, value in table.items():
            if isinstance(value, dict):
                emit(value, f"{prefix}.{key}" if prefix else key)

    emit(dataclasses.asdict(preset), "")
    return "\n".join(lines) + "\n"


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)


def _apply_override(table: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set takes key=value, for example train.mtd.lr=1e-4; got {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string, so that --set base.path=folder needs no quotes
    *parents, last = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {key}: {parent!r} is a value, not a table")
    table[last] = value


def _build(cls: type, table: object, where: str):
    if not isinstance(table, dict):
        raise ConfigError(f"{where or 'preset'} must be a table, got {table!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in table:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else f"; known keys: {', '.join(fields)}"
            raise ConfigError(f"unknown key {_join(where, key)!r}{hint}")
    missing = [
        name
        for name, f in fields.items()
        if name not in table and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where or 'preset'} lacks {', '.join(missing)}")
    values = {key: _convert(hints[key], value, _join(where, key)) for key, value in table.items()}
    return cls(**values)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _convert(hint: object, value: object, where: str):
    if isinstance(hint, types.UnionType):
        (hint,) = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if typing.get_origin(hint) is tuple:
        args = typing.get_args(hint)
        items = list(value) if isinstance(value, (list, tuple)) else None
        if items is None or (args[-1] is not Ellipsis and len(items) != len(args)):
            wanted = "a list" if args[-1] is Ellipsis else f"a list of {len(args)}"
            raise ConfigError(f"{where} must be {wanted}, got {value!r}")
        return tuple(_convert(args[0], item, where) for item in items)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be of type {hint.__name__}, got {value!r}")
    return value
