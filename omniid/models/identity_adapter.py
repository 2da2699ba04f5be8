"""The identity adapter: decoupled attention of every FLUX block to a person's tokens (Sec. 3.3).

`O_img += s * softmax(Q_img K_id^T / sqrt(d)) V_id`, before the block's output projection. Q is the block's own query
after its RMS norm and rotary phase; the identity's keys carry no phase, as if at position 0, where FLUX's text tokens
are. Values start at zero, so an untrained adapter leaves FLUX's output as it is, to the bit.
Shapes: B pictures, L identity tokens of C channels, N blocks, H heads of D channels.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from omniid.errors import OmniIDError
from omniid.files import atomic_path
from omniid.kernels.add_identity_attention import add_identity_attention as add_one_identity
from omniid.kernels.add_identity_attention import add_identity_attention_ as add_one_identity_
from omniid.kernels.dense_attention import dense_attention
from omniid.models.flux import CONTROL_SAMPLES, FluxLayout, TextEmbedding, attention_modules, layout_of
from omniid.models.hub_model import CARD, HubModel

if TYPE_CHECKING:
    from omniid.identity import Identity

FORMAT_VERSION = 1
SCALE_SUFFIX = "_scale"
"""After the name of a weight in fp8: fp32 scales (inner) of its rows (inner, C)."""


class AdapterError(OmniIDError):
    """An adapter file that cannot be used, or not with this base or encoder."""


@dataclass(frozen=True, slots=True)
class IdentityKV:
    """Keys and values of one identity (or a batch of them) for every block: (N, B, L, H, D) each.

    They depend on neither step nor prompt: made once per identity, used by all steps.
    """

    keys: Tensor
    values: Tensor

    def to(self, *args, **kwargs) -> "IdentityKV":
        return IdentityKV(self.keys.to(*args, **kwargs), self.values.to(*args, **kwargs))

    def repeat(self, times: int) -> "IdentityKV":
        """Every identity `times` times in a row: B becomes B * times."""
        if times == 1:
            return self
        return IdentityKV(self.keys.repeat_interleave(times, dim=1), self.values.repeat_interleave(times, dim=1))

    def of(self, chosen: Tensor) -> "IdentityKV":
        """Those of the batch with these indices (N,)."""
        return IdentityKV(self.keys[:, chosen], self.values[:, chosen])


@dataclass(slots=True)
class IdentityUse:
    """One identity in a picture: what it is, how strongly, and where."""

    kv: IdentityKV
    scale: float | Tensor = 1.0
    """s: a number, or a map (B, L_img) or (1, L_img) with one value per image token."""
    block_scales: Sequence[float] | None = None
    """Factors on s for each of the N blocks; None is 1 for all."""
    strength: float = 1.0
    """Factor on s that a schedule sets between steps: 0 leaves this identity out."""

    def scale_of(self, block: int) -> float | Tensor | None:
        """s in that block now; None where the identity does not act there."""
        factor = self.strength * (1.0 if self.block_scales is None else self.block_scales[block])
        if factor == 0 or (not isinstance(self.scale, Tensor) and self.scale == 0):
            return None
        return self.scale * factor


class IdentityAdapter(
    nn.Module, HubModel, library_name="omniid", tags=["face", "identity", "flux"], model_card_template=CARD
):
    """Projections of identity tokens to keys and values, one pair for each block of a FLUX transformer."""

    WEIGHTS_FILE = "adapter.safetensors"

    def __init__(self, width: int, num_blocks: int, num_heads: int, head_dim: int):
        super().__init__()
        self.width, self.num_blocks, self.num_heads, self.head_dim = width, num_blocks, num_heads, head_dim
        self.encoder_fingerprint = ""
        """Fingerprint of the encoder whose tokens this adapter reads; empty before training."""
        inner = num_heads * head_dim
        # No bias: softmax ignores what all keys share, and a shared value would not depend on who the person is.
        self.to_k_id = nn.ModuleList(nn.Linear(width, inner, bias=False) for _ in range(num_blocks))
        self.to_v_id = nn.ModuleList(nn.Linear(width, inner, bias=False) for _ in range(num_blocks))
        self.norm_k_id = nn.ModuleList(nn.RMSNorm(head_dim, eps=1e-6) for _ in range(num_blocks))
        for to_k, to_v in zip(self.to_k_id, self.to_v_id, strict=True):
            nn.init.normal_(to_k.weight, std=width**-0.5)
            nn.init.zeros_(to_v.weight)

    @classmethod
    def for_transformer(cls, transformer: nn.Module, width: int) -> "IdentityAdapter":
        """An untrained adapter for a `FluxTransformer2DModel`; its key norms start as those of the blocks."""
        layout = layout_of(transformer)
        adapter = cls(width, layout.num_blocks, layout.num_heads, layout.head_dim)
        with torch.no_grad():
            for norm, attention in zip(adapter.norm_k_id, attention_modules(transformer), strict=True):
                norm.weight.copy_(attention.norm_k.weight)
        return adapter

    def project(self, tokens: Tensor) -> IdentityKV:
        """Keys and values for all blocks from identity tokens (B, L, C)."""
        if tokens.dim() != 3 or tokens.shape[-1] != self.width:
            raise ValueError(f"identity tokens must be (B, L, {self.width}), got {tuple(tokens.shape)}")
        shape = (*tokens.shape[:2], self.num_heads, self.head_dim)
        keys = [
            # Autocast gives bf16 keys; the norm, whose weight is not cast, runs in the weight's precision.
            norm(to_k(tokens).view(shape).to(norm.weight.dtype))
            for to_k, norm in zip(self.to_k_id, self.norm_k_id, strict=True)
        ]
        values = [to_v(tokens).view(shape) for to_v in self.to_v_id]
        return IdentityKV(torch.stack(keys), torch.stack(values))

    def check_base(self, transformer: nn.Module) -> None:
        """Raises AdapterError when the transformer's blocks are not those this adapter was made for."""
        layout: FluxLayout = layout_of(transformer)
        mine = (self.num_blocks, self.num_heads, self.head_dim)
        its = (layout.num_blocks, layout.num_heads, layout.head_dim)
        if mine != its:
            raise AdapterError(
                "the identity adapter was trained for another base model: it has "
                "{} blocks of {} heads of {} channels, the base has {} of {} of {}; "
                "use the base that belongs to it or train an adapter for this one".format(*mine, *its)
            )

    def save(self, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Writes weights and sizes as one safetensors file; in float8_e4m3fn every output channel gets a scale in fp32."""
        from safetensors.torch import save_file

        from omniid.kernels.fp8_rows import FP8, quantize_rows

        sizes = {
            "format_version": FORMAT_VERSION,
            "width": self.width,
            "num_blocks": self.num_blocks,
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "encoder": self.encoder_fingerprint,
        }
        tensors = {}
        for name, tensor in self.state_dict().items():
            if dtype == FP8 and tensor.dim() == 2:
                rows = quantize_rows(tensor.detach().float())
                tensors[name], tensors[name + SCALE_SUFFIX] = rows.values.cpu().contiguous(), rows.scales.cpu()
            else:
                tensors[name] = tensor.detach().to("cpu", torch.bfloat16 if dtype == FP8 else dtype).contiguous()
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"omniid_adapter": json.dumps(sizes)})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        """Reads a file that `save` wrote. Raises AdapterError when it is missing, damaged or something else."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise AdapterError(f"there is no identity adapter at {path}; train one with: omniid train flow")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = (file.metadata() or {}).get("omniid_adapter")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{path} is damaged ({error}); copy or train it again") from error
        if metadata is None:
            raise AdapterError(
                f"{path} is no identity adapter of omniid; give the adapter.safetensors that omniid train flow wrote"
            )
        sizes = json.loads(metadata)
        if sizes["format_version"] > FORMAT_VERSION:
            raise AdapterError(
                f"{path} has format {sizes['format_version']}, this omniid reads up to {FORMAT_VERSION}; update omniid"
            )
        adapter = cls(sizes["width"], sizes["num_blocks"], sizes["num_heads"], sizes["head_dim"])
        for name in [name for name in tensors if name.endswith(SCALE_SUFFIX)]:
            scales, weight = tensors.pop(name), name.removesuffix(SCALE_SUFFIX)
            if weight in tensors:
                tensors[weight] = tensors[weight].float() * scales.unsqueeze(1)
        try:
            adapter.load_state_dict(tensors)
        except RuntimeError as error:
            raise AdapterError(f"{path} lacks weights that its sizes call for; copy or train it again") from error
        adapter.encoder_fingerprint = sizes["encoder"]
        return adapter.to(device=device, dtype=dtype)

    @classmethod
    def _from_files(cls, weights: Path, folder: Path) -> "IdentityAdapter":
        return cls.load(weights)

    @contextlib.contextmanager
    def drawing(
        self,
        pipeline,
        identities: "Identity | Sequence[Identity]",
        scale: float | Tensor | Sequence[float | Tensor] = 1.0,
        guidance: float = 1.0,
        one_each: bool = False,
        guide_text: TextEmbedding | None = None,
    ) -> Iterator["AttachedIdentities"]:
        """Within it, any FLUX pipeline of diffusers draws the given people; no other code has to change.

        identities: one person, or several, each added with its own `scale` (a number or a map with one value per image
        token). one_each: instead, picture i of a batch shows identity i; the call then has as many prompts as identities,
        and one picture for each. guidance, guide_text: as of `attach_identities`. Raises AdapterError for a base that this
        adapter was not made for, IdentityFileError for identities of another encoder.
        """
        from omniid.identity import Identity

        self.check_base(pipeline.transformer)
        people = [identities] if isinstance(identities, Identity) else list(identities)
        for person in people:
            person.check_encoder(self.encoder_fingerprint)
        weight = self.to_k_id[0].weight
        with torch.no_grad():
            kv = self.project(torch.stack([person.tokens for person in people]).to(weight.device, weight.dtype))
        kv = kv.to(pipeline._execution_device, pipeline.transformer.dtype)
        if one_each:
            uses = [IdentityUse(kv, scale)]
        else:
            scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(people)
            if len(scales) != len(people):
                raise ValueError(f"{len(scales)} scales for {len(people)} identities; give one for each")
            uses = [
                IdentityUse(IdentityKV(keys.unsqueeze(1), values.unsqueeze(1)), one)
                for keys, values, one in zip(kv.keys.unbind(1), kv.values.unbind(1), scales, strict=True)
            ]
        with attach_identities(pipeline.transformer, uses, guidance=guidance, guide_text=guide_text) as attached:
            yield attached


def add_identity_attention(
    output: Tensor, query: Tensor, uses: Sequence[tuple[Tensor, Tensor, float | Tensor]]
) -> Tensor:
    """output + sum over identities of s * softmax(Q K^T / sqrt(d)) V.

    output, query: (B, L_img, H, D). uses: keys and values (B or 1, L, H, D) and s (number, (B, L_img) or (1, L_img)) of each.
    """
    for keys, values, scale in uses:
        output = add_one_identity(output, query, keys.to(query.dtype), values.to(query.dtype), scale)
    return output


class AttachedIdentities:
    """The identities that the processors of one transformer add now; their strengths may change from step to step."""

    def __init__(
        self,
        uses: Sequence[IdentityUse],
        num_blocks: int,
        for_training: bool,
        guidance: float = 1.0,
        negative: Sequence[IdentityUse] = (),
    ):
        for use in (*uses, *negative):
            if use.block_scales is not None and len(use.block_scales) != num_blocks:
                raise ValueError(f"{len(use.block_scales)} block scales for a transformer of {num_blocks} blocks")
        self.uses, self.negative, self.for_training, self.guidance = list(uses), list(negative), for_training, guidance
        self.is_guide_pass = False
        self.num_image_tokens = 0
        self.of_block: list[list[tuple[Tensor, Tensor, float | Tensor]]] = [[] for _ in range(num_blocks)]
        """Keys, values and scale of every identity that acts in this pass, for each block."""

    def begin_pass(self, hidden_states: Tensor) -> None:
        """Called before every forward pass of the transformer, with its image tokens (B, L_img, C)."""
        self.num_image_tokens = hidden_states.shape[1]
        acting = self.negative if self.is_guide_pass else self.uses
        for use in acting:
            # Only here is it known where an offloaded transformer computes; a move happens once, in the first pass.
            use.kv = use.kv.to(hidden_states.device)
            if isinstance(use.scale, Tensor):
                use.scale = use.scale.to(hidden_states.device)
        for block, now in enumerate(self.of_block):
            now[:] = [
                (use.kv.keys[block], use.kv.values[block], scale)
                for use in acting
                if (scale := use.scale_of(block)) is not None
            ]


class IdentityAttnProcessor:
    """FLUX's joint attention followed by the identity's; serves double and single blocks."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, uses: list[tuple[Tensor, Tensor, float | Tensor]], attached: AttachedIdentities):
        """uses: the block's list in `attached`. Its number would make torch.compile work anew for every block."""
        self.uses, self.attached = uses, attached

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden_states: image tokens in a double block; text, then image tokens in a single block."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn
        from diffusers.models.embeddings import apply_rotary_emb
        from diffusers.models.transformers.transformer_flux import _get_qkv_projections

        query, key, value, text_query, text_key, text_value = _get_qkv_projections(
            attn, hidden_states, encoder_hidden_states
        )
        heads = (-1, attn.head_dim)
        query = attn.norm_q(query.unflatten(-1, heads))  # (B, L, H, D)
        key = attn.norm_k(key.unflatten(-1, heads))
        value = value.unflatten(-1, heads)
        if attn.added_kv_proj_dim is not None:
            query = torch.cat([attn.norm_added_q(text_query.unflatten(-1, heads)), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key.unflatten(-1, heads)), key], dim=1)
            value = torch.cat([text_value.unflatten(-1, heads), value], dim=1)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        if self.attached.for_training and attention_mask is None:
            output = dense_attention(query, key, value)
        else:
            output = dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask=attention_mask,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
        num_text_tokens = output.shape[1] - self.attached.num_image_tokens
        if self.uses:
            output = self.add_identities(output, query, num_text_tokens)
        output = output.flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return output
        text, image = output.split_with_sizes([num_text_tokens, self.attached.num_image_tokens], dim=1)
        image = attn.to_out[1](attn.to_out[0](image.contiguous()))
        return image, attn.to_add_out(text.contiguous())

    def add_identities(self, output: Tensor, query: Tensor, num_text_tokens: int) -> Tensor:
        """The joint attention's output (B, L, H, D) with the identities' added to its image tokens; may write into it."""
        image, image_query = output[:, num_text_tokens:], query[:, num_text_tokens:]
        if torch.is_grad_enabled():
            image = add_identity_attention(image, image_query, self.uses)
            return torch.cat([output[:, :num_text_tokens], image], dim=1)
        for keys, values, scale in self.uses:  # nobody else holds the output yet
            add_one_identity_(image, image_query, keys.to(query.dtype), values.to(query.dtype), scale)
        return output


@contextlib.contextmanager
def attach_identities(
    transformer: nn.Module,
    uses: Sequence[IdentityUse],
    for_training: bool = False,
    guidance: float = 1.0,
    negative: Sequence[IdentityUse] = (),
    guide_text: TextEmbedding | None = None,
) -> Iterator[AttachedIdentities]:
    """Within it, the transformer draws the given identities; afterwards it is as it was before.

    for_training: take this package's attention for the joint part too, whose backward is several times faster on a CPU;
    its output equals diffusers' to rounding. Otherwise the joint part is diffusers' own, to the bit.
    guidance: other than 1, every step runs a second time with the `negative` identities (none by default) in place of the
    others, and the difference is taken that many times (classifier-free guidance by the identity; twice the time). Steps in
    which no identity acts run once.
    guide_text: one prompt's embedding, as long as the others', which takes their place in that second run, and what a ControlNet
    says is left out there; an empty prompt's makes it guidance by identity, prompt and landmarks together.
    Yields the state that the processors read, so that a caller can change strengths between steps. Raises AdapterError for
    a transformer whose attention another adapter has replaced.
    """
    modules = attention_modules(transformer)
    attached = AttachedIdentities(uses, len(modules), for_training, guidance, negative)
    before = [attention.processor for attention in modules]
    for processor in before:
        if type(processor).__name__ != "FluxAttnProcessor":
            raise AdapterError(
                f"the transformer's attention is replaced by {type(processor).__name__} already; unload the other adapter "
                "first (pipe.unload_ip_adapter() for an IP-Adapter of diffusers)"
            )

    def begin_pass(module: nn.Module, args: tuple, kwargs: dict) -> None:
        attached.begin_pass(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def guide(module: nn.Module, args: tuple, kwargs: dict, output):
        if attached.is_guide_pass or attached.guidance == 1 or not any(attached.of_block):
            return output
        if guide_text is not None:
            text = guide_text.expand(len(output[0]))
            said = {"encoder_hidden_states": text.tokens, "pooled_projections": text.pooled}
            # What is not there stays away: other arguments would make a compiled transformer compile again.
            kwargs = kwargs | said | {name: None for name in CONTROL_SAMPLES if name in kwargs}
        attached.is_guide_pass = True  # which also ends the recursion
        try:
            plain = module(*args, **kwargs)[0]
        finally:
            attached.is_guide_pass = False
        guided = plain + attached.guidance * (output[0] - plain)
        return (guided,) if isinstance(output, tuple) else type(output)(sample=guided)

    hooks = [
        transformer.register_forward_pre_hook(begin_pass, with_kwargs=True),
        transformer.register_forward_hook(guide, with_kwargs=True),
    ]
    try:
        for attention, uses_of_block, old in zip(modules, attached.of_block, before, strict=True):
            processor = IdentityAttnProcessor(uses_of_block, attached)
            # What set_attention_backend and context parallelism chose stays chosen.
            processor._attention_backend, processor._parallel_config = old._attention_backend, old._parallel_config
            attention.set_processor(processor)
        yield attached
    finally:
        for hook in hooks:
            hook.remove()
        for attention, processor in zip(modules, before, strict=True):
            attention.set_processor(processor)
