"""Frozen parts with 4-bit weights: the products of the widened weights, gradients through them, and refusals."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from omniid.config import ConfigError, load_preset, preset_to_toml
from omniid.models import frozen_precision
from omniid.models.frozen_precision import (
    BYTES,
    FrozenPrecisionError,
    check_frozen_precision,
    num_quantizable,
    quantize_frozen,
)
from omniid.models.mini_base import build_base
from omniid.train.costs import count_costs
from omniid.train.plan import memory_of
from omniid.train.run import run_stage

needs_bitsandbytes = pytest.mark.skipif(
    not frozen_precision.importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed"
)


@pytest.fixture
def base(tiny):
    pipeline = build_base(tiny.base.sizes, tiny.base.max_sequence_length, ["photo"], seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return pipeline


def velocity(transformer, tokens):
    return transformer(
        hidden_states=tokens,
        timestep=torch.tensor([0.3, 0.8]),
        guidance=torch.ones(2),
        pooled_projections=torch.ones(2, transformer.config.pooled_projection_dim),
        encoder_hidden_states=torch.ones(2, 5, transformer.config.joint_attention_dim),
        txt_ids=torch.zeros(5, 3),
        img_ids=torch.zeros(4, 3),
        return_dict=False,
    )[0]


def widened(module):
    """A copy with ordinary layers that hold the values of the narrow ones."""
    from bitsandbytes.functional import dequantize_4bit

    plain = copy.deepcopy(module)
    for parent in list(plain.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Linear4bit":
                layer = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                with torch.no_grad():
                    layer.weight.copy_(dequantize_4bit(child.weight.data, child.weight.quant_state))
                    if child.bias is not None:
                        layer.bias.copy_(child.bias)
                setattr(parent, name, layer)
    return plain


@needs_bitsandbytes
def test_nf4_multiplies_by_the_widened_weights_forward_and_backward(base, generator):
    transformer = base.transformer.requires_grad_(False)
    tokens = torch.randn(2, 4, transformer.config.in_channels, generator=generator)
    exact, quantizable = velocity(transformer, tokens), num_quantizable(transformer)
    count = quantize_frozen(transformer, "nf4", torch.float32, "cpu")
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    narrow = [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
    assert count == len(narrow) > 20 and all(layer.weight.dtype == torch.uint8 for layer in narrow)
    assert sum(2 * layer.weight.numel() for layer in narrow) == quantizable
    assert type(transformer.x_embedder) is nn.Linear and type(transformer.proj_out) is nn.Linear
    found = []
    for model in (transformer, widened(transformer)):
        asked = tokens.clone().requires_grad_()
        out = velocity(model, asked)
        out.square().sum().backward()
        found.append((out, asked.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    error = (found[0][0] - exact).norm() / exact.norm()
    assert 0.001 < error < 0.5


@needs_bitsandbytes
def test_text_encoders_run_with_narrow_layers(base):
    for part, ids in ((base.text_encoder, torch.ones(1, 24)), (base.text_encoder_2, torch.ones(1, 24))):
        exact = part(ids.long())[0]
        assert quantize_frozen(part.requires_grad_(False), "nf4", torch.float32, "cpu") > 0
        error = (part(ids.long())[0] - exact).norm() / exact.norm()
        assert 0 < error < 0.5


def test_auto_only_casts(base):
    assert quantize_frozen(base.transformer, "auto", torch.bfloat16, "cpu") == 0
    assert {parameter.dtype for parameter in base.transformer.parameters()} == {torch.bfloat16}


def test_what_cannot_run_is_refused_in_a_sentence(monkeypatch):
    check_frozen_precision("auto", "cpu")
    monkeypatch.setattr(frozen_precision.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FrozenPrecisionError, match=r"nf4 needs bitsandbytes; install it with: pip install"):
        check_frozen_precision("nf4", "cpu")
    monkeypatch.setattr(frozen_precision.importlib.util, "find_spec", lambda name: object())

    def fail(*arguments):
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(frozen_precision, "_nf4", fail)
    with pytest.raises(
        FrozenPrecisionError, match=r"does not run on cuda \(no kernel image\); take base_precision=auto"
    ):
        check_frozen_precision("nf4", "cuda")


def test_stages_without_a_frozen_base_refuse_it(tiny, records, tmp_path):
    (tmp_path / "tiny.toml").write_text(preset_to_toml(tiny))
    with pytest.raises(ConfigError, match=r"base_precision is for stages with a frozen base.*\[train\.mtd\]"):
        run_stage(
            "mtd",
            tmp_path / "tiny.toml",
            records,
            tmp_path / "run",
            overrides=["train.mtd.base_precision=nf4"],
            device="cpu",
        )
    with pytest.raises(ConfigError, match="base_precision must be auto or nf4, got 'int3'"):
        dataclasses.replace(tiny.train.flow, base_precision="int3")


def test_a_plan_counts_narrow_weights():
    preset = load_preset("mini")
    parts = count_costs("flow", preset, "bf16", "none")
    base = next(part for part in parts if part.name == "base")
    assert 0.8 * base.parameters < base.quantizable < base.parameters
    wide, narrow = (
        memory_of(parts, parts, dataclasses.replace(preset.train.flow, base_precision=precision), 16, "bf16", 1).weights
        for precision in ("auto", "nf4")
    )
    assert wide - narrow == pytest.approx((2 - BYTES["nf4"]) * base.quantizable)
