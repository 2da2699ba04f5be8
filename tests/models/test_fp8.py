"""Blocks in fp8: which layers, how near to the plain ones, and what stays of names, memory and gradients."""

import dataclasses

import pytest
import torch
from torch import nn

from omniid.data.few_to_many import FewToManyBatches
from omniid.data.records import open_records
from omniid.errors import OmniIDError
from omniid.models import fp8
from omniid.models.fp8 import Fp8Linear, FrozenFp8Linear, check_fp8_device, freeze_in_fp8, train_in_fp8
from omniid.models.mini_base import build_transformer
from omniid.train.draws import identity_generators
from omniid.train.loop import Trainer
from omniid.train.mtd import MTDStage


@pytest.fixture
def transformer(tiny):
    model, generator = build_transformer(tiny.base.sizes).requires_grad_(False), torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # an untrained one's head is zero
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def velocity(transformer, scale: torch.Tensor | None = None):
    generator = torch.Generator().manual_seed(1)
    config = transformer.config
    tokens = torch.randn(2, 16, config.in_channels, generator=generator)
    return transformer(
        hidden_states=tokens if scale is None else tokens * scale,
        timestep=torch.tensor([0.3, 0.8]),
        guidance=torch.ones(2) if config.guidance_embeds else None,
        pooled_projections=torch.randn(2, config.pooled_projection_dim, generator=generator),
        encoder_hidden_states=torch.randn(2, 5, config.joint_attention_dim, generator=generator),
        txt_ids=torch.zeros(5, 3),
        img_ids=torch.zeros(16, 3),
        return_dict=False,
    )[0]


def relative(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


def test_a_frozen_base_stays_near_and_passes_gradients(transformer):
    scale = torch.ones((), requires_grad=True)
    wanted = velocity(transformer, scale)
    (wanted_gradient,) = torch.autograd.grad(wanted.square().sum(), scale)
    double, single = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    # q, k, v and out of both streams, two feed-forwards of two layers; q, k, v, MLP and out of a single block.
    assert freeze_in_fp8(transformer, for_training=True) == 12 * double + 5 * single
    got = velocity(transformer, scale)
    (gradient,) = torch.autograd.grad(got.square().sum(), scale)
    assert 0 < relative(got, wanted) < 0.08
    assert gradient.item() == pytest.approx(wanted_gradient.item(), rel=0.1)


def test_modulations_embeddings_and_head_stay(transformer):
    freeze_in_fp8(transformer)
    assert type(transformer.x_embedder) is type(transformer.proj_out) is nn.Linear
    assert type(transformer.transformer_blocks[0].norm1.linear) is nn.Linear
    assert isinstance(transformer.single_transformer_blocks[0].proj_mlp, FrozenFp8Linear)


def test_a_base_frozen_for_drawing_takes_half_of_bf16_and_refuses_gradients(transformer):
    layer = transformer.transformer_blocks[0].ff.net[2]
    in_bf16 = layer.weight.numel() * 2
    freeze_in_fp8(transformer)
    frozen = transformer.transformer_blocks[0].ff.net[2]
    held = sum(b.numel() * b.element_size() for name, b in frozen.named_buffers() if name != "bias")
    assert held < 0.6 * in_bf16
    with torch.no_grad():
        velocity(transformer)
    with pytest.raises(RuntimeError, match="for_training"):
        velocity(transformer, torch.ones((), requires_grad=True))


def test_a_change_of_dtype_leaves_the_rounded_weights(transformer):
    freeze_in_fp8(transformer)
    frozen = transformer.single_transformer_blocks[0].proj_mlp
    values, scales = frozen.values.clone(), frozen.scales.clone()
    transformer.to(torch.bfloat16)
    assert frozen.values.dtype == torch.float8_e4m3fn and frozen.scales.dtype == torch.float32
    assert torch.equal(frozen.values.view(torch.uint8), values.view(torch.uint8)) and torch.equal(frozen.scales, scales)
    assert frozen.bias.dtype == torch.bfloat16


def test_a_layer_of_other_sizes_stays(tiny):
    block = build_transformer(tiny.base.sizes)
    block.single_transformer_blocks[0].proj_mlp = nn.Linear(24, 40)
    before = train_in_fp8(block)
    assert type(block.single_transformer_blocks[0].proj_mlp) is nn.Linear
    assert before == 12 * len(block.transformer_blocks) + 5 * len(block.single_transformer_blocks) - 1


def test_training_keeps_names_and_stays_near(tiny, records):
    batch = FewToManyBatches(open_records(records, "train"), 32, 4, (1, 3), 2, seed=0, steps=1)[0]

    def loss_and_gradients(in_fp8: bool):
        torch.manual_seed(0)
        stage = MTDStage(tiny)
        if in_fp8:
            # Attention q, k, v, out and two MLP layers of the tower; q, kv, out and the MLP elsewhere.
            assert train_in_fp8(stage.model) == 6 * tiny.tower.num_layers + 5 * (4 + 4)
        loss, _ = stage.loss(batch.to_device(torch.device("cpu")), identity_generators(0, batch.places))
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in stage.model.named_parameters()}

    (wanted, wanted_gradients), (loss, gradients) = loss_and_gradients(False), loss_and_gradients(True)
    assert 0 < relative(loss, wanted) < 0.02
    assert gradients.keys() == wanted_gradients.keys()
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    both = [torch.cat([g[name].flatten() for name in wanted_gradients]) for g in (gradients, wanted_gradients)]
    assert torch.cosine_similarity(*both, dim=0) > 0.95


def test_a_run_in_fp8_exports_plain_weights(tiny, records, tmp_path):
    config = dataclasses.replace(tiny.train.mtd, steps=2, fp8=True)
    rows = open_records(records, "train"), open_records(records, "validation")
    stage = MTDStage(tiny)
    trainer = Trainer(stage, tiny, config, *rows, tmp_path / "run", device="cpu", progress=False)
    trainer.run()
    trainer.export(tmp_path / "weights")
    assert any(isinstance(module, Fp8Linear) for module in stage.model.modules())
    MTDStage(tiny).load(tmp_path / "weights")  # the names and sizes of an ordinary run


def test_a_gpu_without_fp8_is_refused(monkeypatch):
    monkeypatch.setattr(fp8.torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(OmniIDError, match=r"8\.9"):
        check_fp8_device("cuda")
    check_fp8_device("cpu")
