"""`--plan`: figures of the paper's sizes against ones worked out by hand, and how they follow the settings."""

import dataclasses
import json
import runpy
import shutil
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from omniid.cli.commands.train import GPU_NAMES
from omniid.cli.main import main
from omniid.config import ConfigError, load_preset
from omniid.data.few_to_many import FewToManyBatches
from omniid.data.records import open_records
from omniid.data.scenes import SceneBatches
from omniid.errors import OmniIDError
from omniid.models.flux import base_without_weights
from omniid.models.landmark_controlnet import save_landmark_controlnet
from omniid.models.latent_recogniser import LatentRecogniser
from omniid.train.base import BaseStage
from omniid.train.control import ControlStage
from omniid.train.costs import count_costs
from omniid.train.draws import identity_generators
from omniid.train.flow import FlowStage
from omniid.train.hardware import GPUS
from omniid.train.plan import plan_stage, plan_text
from omniid.train.t2i import T2IStage


@pytest.fixture(scope="module")
def paper_mtd():
    return plan_stage("mtd", "paper", num_gpus=8, price_per_gpu_hour=2.0)


def test_mtd_at_the_papers_sizes_agrees_with_the_sums_by_hand(paper_mtd):
    """An identity of 3 inputs and 8 targets, 2 M N K for each product, attention's backward pass 2.5 times its forward."""
    assert paper_mtd.step_flops_per_identity == pytest.approx(3.600e12, rel=0.05)
    assert paper_mtd.all_rows_flops_per_identity == pytest.approx(4.100e12, rel=0.05)
    assert paper_mtd.forward_flops == pytest.approx((1.004 + 0.049 + 0.141) * 1e12, rel=0.05)
    parts = {part.name: part for part in paper_mtd.parts}
    assert parts["tower"].parameters == pytest.approx(631e6, rel=0.01)
    assert parts["encoder"].parameters == pytest.approx(79e6, rel=0.01)
    assert parts["decoder"].parameters == pytest.approx(80e6, rel=0.01)
    assert parts["tower"].forward_flops + parts["tower"].backward_flops == pytest.approx(3.028e12, rel=0.05)
    # Without fused kernels a tower layer keeps about 24 units of 257 x 1280 bf16 numbers a photo.
    assert parts["tower"].kept_bytes == pytest.approx(48.5e9 / 32, rel=0.2)


@pytest.fixture(scope="module")
def roofline(test_data):
    """The functions of a script that counts FLOPs by formulas of its own."""
    path = test_data.parent / "tools" / "roofline.py"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return SimpleNamespace(**runpy.run_path(str(path)))


def test_mtd_agrees_with_a_count_by_formulas(paper_mtd, roofline):
    parts = {part.name: part for part in paper_mtd.parts}
    whole = [roofline.vit(3), roofline.enc(3), roofline.dec_pruned()]
    for part, (linear, attention) in zip(parts.values(), whole, strict=True):
        assert part.forward_flops == pytest.approx(linear + attention, rel=0.05)
        assert part.forward_flops + part.backward_flops == pytest.approx(3 * linear + 3.5 * attention, rel=0.05)
    assert paper_mtd.step_flops_per_identity == pytest.approx(sum(3 * a + 3.5 * b for a, b in whole), rel=0.05)


@pytest.mark.slow
def test_flow_agrees_with_a_count_by_formulas(roofline):
    parts = {part.name: part for part in count_costs("flow", load_preset("paper"), "bf16", "none")}
    flux = roofline.flux_step(1024, kvcached=False)
    forward = flux["lin"] + flux["att"] + flux["ip_att"]
    backward = flux["lin"] + 2.5 * (flux["att"] + flux["ip_att"])
    assert parts["base"].forward_flops / 8 == pytest.approx(forward, rel=0.05)
    assert parts["base"].backward_flops / 8 == pytest.approx(backward, rel=0.05)


def test_time_and_cost_follow_from_flops(paper_mtd):
    assert paper_mtd.step_flops == pytest.approx(256 * 3.6e12, rel=0.05)
    assert paper_mtd.step_s == pytest.approx(paper_mtd.step_flops / (8 * 791e12 * 0.42), rel=1e-3)
    assert paper_mtd.gpu_hours == pytest.approx(8 * 250_000 * paper_mtd.step_s / 3600)
    assert paper_mtd.cost == pytest.approx(2 * paper_mtd.gpu_hours)
    assert paper_mtd.images_per_s == pytest.approx(11 * 256 / paper_mtd.step_s)


def test_memory_modes_trade_memory_for_work(paper_mtd):
    none, selective, full = (paper_mtd.memory[mode].total for mode in ("none", "selective", "full"))
    assert none > selective > full
    assert paper_mtd.memory_mode == "none" and paper_mtd.fits
    assert paper_mtd.memory["none"].optimizer == 8 * paper_mtd.trained_parameters
    kept, again = (plan_stage("mtd", "mini", overrides=[f"train.mtd.memory={mode}"]) for mode in ("none", "full"))
    assert (kept.memory_mode, again.memory_mode) == ("none", "full")
    assert 1.05 * kept.step_flops < again.step_flops < 1.35 * kept.step_flops
    assert again.step_flops_per_identity == kept.step_flops_per_identity


def test_accumulation_that_fits_is_told_and_does(tiny_file):
    many = [f"train.mtd.batch_identities={1 << 18}"]
    alone = plan_stage("mtd", tiny_file, gpu="rtx4090", overrides=many)
    assert not alone.fits and alone.accumulation_that_fits > 1
    assert f"--set train.mtd.accumulation={alone.accumulation_that_fits}" in plan_text(alone)
    again = plan_stage(
        "mtd", tiny_file, gpu="rtx4090", overrides=[*many, f"train.mtd.accumulation={alone.accumulation_that_fits}"]
    )
    assert again.fits and again.step_flops <= alone.step_flops


def test_sharding_spreads_the_optimizer(tiny_file):
    whole, sharded = (
        plan_stage("mtd", tiny_file, num_gpus=4, overrides=[f"train.mtd.sharding={kind}"]) for kind in ("none", "fsdp2")
    )
    assert sharded.memory["none"].optimizer == whole.memory["none"].optimizer / 4
    assert sharded.memory["none"].total < whole.memory["none"].total


@pytest.mark.slow
def test_flow_at_the_papers_sizes_agrees_with_the_sums_by_hand():
    """Of one target at 512 px: 21.9 TFLOP forward and 24.9 backward through the frozen base with 512 + 1024 tokens."""
    costs = {
        mode: {p.name: p for p in count_costs("flow", load_preset("paper"), "bf16", mode)} for mode in ("none", "full")
    }
    base, adapter, again = costs["none"]["base"], costs["none"]["adapter"], costs["full"]["base"]
    assert base.parameters == pytest.approx(11.90e9, rel=1e-3) and not base.is_trained
    assert adapter.parameters == pytest.approx(448e6, rel=0.01) and adapter.is_trained
    assert base.forward_flops / 8 == pytest.approx(21.90e12, rel=0.05)
    assert base.backward_flops / 8 == pytest.approx(24.89e12, rel=0.05)
    assert adapter.forward_flops == pytest.approx(0.230e12, rel=0.05)
    assert costs["none"]["autoencoder"].forward_flops / 8 == pytest.approx(1.1e12, rel=0.05)
    assert again.backward_flops - base.backward_flops == pytest.approx(base.forward_flops, rel=0.05)
    # A block's input is kept: image and text tokens, 57 blocks.
    assert again.kept_bytes / 8 == pytest.approx(0.54e9, rel=0.25)
    assert round(again.num_recomputed) == 57


def double_block(d, head_dim):
    """Parameters: two modulations by 6, eight projections and two MLPs by 4, four key and query norms."""
    return 2 * (6 * d * d + 6 * d) + 8 * (d * d + d) + 2 * (8 * d * d + 5 * d) + 4 * head_dim


def single_block(d, head_dim):
    """Parameters: modulation by 3, query, key, value, MLP by 4, the output of both, two norms."""
    return 3 * (d * d + d) + 3 * (d * d + d) + (4 * d * d + 4 * d) + (5 * d * d + d) + 2 * head_dim


def linear(inputs, outputs):
    return inputs * outputs + outputs


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["control", "t2i"])
def test_later_stages_at_the_papers_sizes_train_what_the_paper_says(stage):
    """Sec. 4.2 and 4.3: frozen encoder and FLUX; the adapter trains, in `control` with the ControlNet."""
    parts = {part.name: part for part in count_costs(stage, load_preset("paper"), "bf16", "none")}
    d, heads_dim, adapter = 3072, 128, 57 * (2 * 1280 * 3072 + 128)
    trained = {name: part.parameters for name, part in parts.items() if part.is_trained}
    if stage == "control":
        # Picture, landmarks, T5, and an MLP each for time, guidance and CLIP; a projection after every block.
        inputs = 2 * linear(64, d) + linear(4096, d) + 2 * linear(256, d) + linear(768, d) + 3 * linear(d, d)
        blocks = 4 * double_block(d, heads_dim) + 10 * single_block(d, heads_dim) + 14 * linear(d, d)
        assert trained == {"adapter": adapter, "controlnet": inputs + blocks}
        share = (4 + 10) / (19 + 38)
        assert parts["controlnet"].forward_flops == pytest.approx(share * parts["base"].forward_flops, rel=0.1)
        assert parts["autoencoder"].forward_flops == pytest.approx(2 * 1.1e12, rel=0.05)  # targets and landmarks
    else:
        assert trained == {"adapter": adapter}
        assert parts["text"].parameters == pytest.approx(4.762e9 + 0.123e9, rel=0.001)
        assert parts["text"].forward_flops == pytest.approx(4.84e12, rel=0.05)  # T5-XXL on 512 tokens
    frozen = {"tower": 631e6, "encoder": 79e6, "base": 11.90e9}
    assert {name: parts[name].parameters for name in frozen} == pytest.approx(frozen, rel=0.01)
    assert all(parts[name].backward_flops == 0 for name in ("tower", "encoder", "autoencoder"))
    assert parts["base"].forward_flops == pytest.approx(21.90e12, rel=0.05)
    assert parts["base"].backward_flops > parts["base"].forward_flops


@pytest.mark.parametrize(
    ("stage", "identity_share"),
    [("base", 0.0), ("base", 0.5), ("base", 1.0), ("flow", 0.0), ("control", 0.0), ("t2i", 0.0)],
)
def test_the_plan_counts_what_a_real_step_computes(
    tiny, weights, records, monkeypatch, tmp_path, stage, identity_share
):
    """FLOPs of the stage's own loss and gradients, counted while they are computed from real records."""
    monkeypatch.setenv("OMNIID_KERNELS", "reference")  # native kernels are not counted
    settings = dataclasses.replace(
        getattr(tiny.train, stage), num_inputs=(2, 2), control_single_blocks=1, identity_share=identity_share
    )
    if identity_share == 1:  # with an identity loss of five pictures, drawn in a step that is sure to be computed
        LatentRecogniser(16, 4).save(tmp_path / "recogniser.safetensors")
        path = str(tmp_path / "recogniser.safetensors")
        settings = dataclasses.replace(
            settings, identity_loss_weight=0.5, recogniser=path, identity_loss_pictures=5, identity_loss_steps=1,
            batch_identities=4, accumulation=1,
        )  # fmt: skip
    preset = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, **{stage: settings}))
    batches = FewToManyBatches
    if stage == "t2i":  # with a ControlNet that stays frozen
        shutil.copytree(weights, tmp_path, dirs_exist_ok=True)
        save_landmark_controlnet(ControlStage(preset, weights).controlnet, tmp_path / "controlnet")
        settings = dataclasses.replace(settings, keep_controlnet=True, conditioning_dropout=0.0)
        preset = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, t2i=settings))
        batches, weights = SceneBatches, tmp_path
    one = {"base": BaseStage, "flow": FlowStage, "control": ControlStage, "t2i": T2IStage}[stage](preset, weights)
    batch = batches(open_records(records, "train"), 32, 4, (2, 2), 2, seed=0, steps=1, landmarks=True)[0]
    one.model.train()
    # A CPU's fused attention has no formula in PyTorch's counter; its plain form has the same products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        one.loss(batch.to_device(torch.device("cpu")), identity_generators(0, batch.places))[0].backward()
    parts = count_costs(stage, preset, "fp32", "none")
    planned = sum(part.forward_flops + part.backward_flops for part in parts)
    assert planned == pytest.approx(counter.get_total_flops() / 4, rel=0.05)
    trained = sum(parameter.numel() for parameter in one.model.parameters() if parameter.requires_grad)
    assert sum(part.parameters for part in parts if part.is_trained) == pytest.approx(trained, rel=0.05)


def test_control_trains_adapter_and_controlnet_and_freezes_the_encoder(tiny_file):
    plan = plan_stage("control", tiny_file)
    assert {part.name for part in plan.parts if part.is_trained} == {"adapter", "controlnet"}
    assert {part.name for part in plan.parts if part.backward_flops == 0} == {"tower", "encoder", "autoencoder"}
    alone = plan_stage("control", tiny_file, overrides=["train.control.train_adapter=false"])
    assert {part.name for part in alone.parts if part.is_trained} == {"controlnet"}
    again = plan_stage("control", tiny_file, overrides=["train.control.memory=full"])
    assert again.step_flops > plan.step_flops and again.memory["full"].total < plan.memory["none"].total


@pytest.mark.parametrize("kind", ["double", "single"])
def test_a_controlnet_may_lack_blocks_of_a_kind(tiny_file, kind):
    parts, other = {}, {"double": "single", "single": "double"}[kind]
    for count in (0, 1):
        blocks = [f"train.control.control_{kind}_blocks={count}", f"train.control.control_{other}_blocks=1"]
        plan = plan_stage("control", tiny_file, overrides=blocks)
        parts[count] = {part.name: part for part in plan.parts}["controlnet"]
    assert 0 < parts[0].parameters < parts[1].parameters
    assert 0 < parts[0].forward_flops < parts[1].forward_flops


def test_t2i_trains_the_adapter_alone_and_pays_for_what_it_is_asked(tiny, recogniser):
    parts = count_costs("t2i", tiny, "fp32", "none")
    assert {part.name for part in parts if part.is_trained} == {"adapter"}
    assert {part.name for part in parts if part.backward_flops} == {"adapter", "base"}
    t2i = dataclasses.replace(
        tiny.train.t2i, keep_controlnet=True, identity_loss_weight=0.1, recogniser=str(recogniser)
    )
    asked = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, t2i=t2i))
    more = {part.name: part for part in count_costs("t2i", asked, "fp32", "none")}
    assert more.keys() - {part.name for part in parts} == {"controlnet", "vae decoder", "recogniser"}
    assert not more["controlnet"].is_trained and more["controlnet"].backward_flops == 0
    assert more["vae decoder"].backward_flops > 0
    # One convolution of (8, 3, 7, 7) at 16 x 16 places, on drawn and photographed faces of each target.
    once = tiny.train.t2i.num_targets * 2 * 8 * 3 * 7 * 7 * 16 * 16
    assert more["recogniser"].forward_flops == 2 * once and more["recogniser"].backward_flops == once
    t2i = dataclasses.replace(t2i, batch_identities=8, accumulation=2, identity_loss_pictures=2)
    few = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, t2i=t2i))
    less = {part.name: part for part in count_costs("t2i", few, "fp32", "none")}
    share = 2 / (4 * tiny.train.t2i.num_targets)
    for part in ("recogniser", "vae decoder"):
        assert less[part].backward_flops == pytest.approx(share * more[part].backward_flops)


def test_the_landmark_loss_is_paid_for(tiny):
    def parts(**changes):
        control = dataclasses.replace(tiny.train.control, **changes)
        asked = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, control=control))
        return {part.name: part for part in count_costs("control", asked, "fp32", "none")}

    plain, more = parts(), parts(landmark_loss_weight=0.1, landmark_loss_steps=5)
    assert more.keys() - plain.keys() == {"vae decoder", "face network"}
    assert not more["face network"].is_trained and more["face network"].backward_flops > 0
    # The prediction and 0 to 4 steps before it, 2 on average; the prediction alone has gradients.
    for name in ("base", "controlnet"):
        assert more[name].forward_flops == pytest.approx(4 * plain[name].forward_flops)
        assert more[name].backward_flops == pytest.approx(2 * plain[name].backward_flops)
    half = parts(landmark_loss_weight=0.1, landmark_loss_steps=5, conditioning_dropout=0.5)
    assert half["face network"].forward_flops == pytest.approx(0.5 * more["face network"].forward_flops)


def test_mtd_pays_for_the_map_that_reads_codes_and_for_embedding_photos(tiny, recogniser):
    mtd = dataclasses.replace(tiny.train.mtd, identity_loss_weight=0.1, recogniser=str(recogniser))
    asked = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, mtd=mtd))
    plain, more = ({part.name: part for part in count_costs("mtd", one, "fp32", "none")} for one in (tiny, asked))
    assert more.keys() - plain.keys() == {"identity head", "recogniser"}
    read = 2 * tiny.encoder.num_queries * tiny.encoder.width * 8 * 16 * 16
    head = more["identity head"]
    assert head.is_trained and head.forward_flops == read and head.backward_flops == 2 * read
    # One convolution of (8, 3, 7, 7) at 16 x 16 places, on the photograph of each target, without gradients.
    once = mtd.num_targets * 2 * 8 * 3 * 7 * 7 * 16 * 16
    assert more["recogniser"].forward_flops == once and more["recogniser"].backward_flops == 0


def test_drawing_from_noise_costs_half_of_its_steps_beside_the_prediction(tiny, tmp_path):
    path = tmp_path / "recogniser.safetensors"
    LatentRecogniser(16, 4).save(path)

    def base(steps):
        flow = dataclasses.replace(
            tiny.train.flow, identity_loss_weight=0.1, recogniser=str(path), identity_loss_steps=steps
        )
        asked = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, flow=flow))
        return {part.name: part for part in count_costs("flow", asked, "fp32", "none")}["base"]

    none, one, five = base(0), base(1), base(5)
    assert one.forward_flops == pytest.approx(2 * none.forward_flops)
    assert five.forward_flops == pytest.approx(4 * none.forward_flops)  # 0 to 4 steps before the last: 2
    assert one.backward_flops == five.backward_flops == pytest.approx(2 * none.backward_flops)


def test_a_recogniser_of_latents_costs_little(tiny, tmp_path):
    path = tmp_path / "recogniser.safetensors"
    LatentRecogniser(16, 4).save(path)
    flow = dataclasses.replace(tiny.train.flow, identity_loss_weight=0.1, recogniser=str(path))
    asked = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, flow=flow))
    parts = {part.name: part for part in count_costs("flow", asked, "fp32", "none")}
    own = {part.name: part for part in count_costs("recogniser", tiny, "fp32", "none")}
    assert own.keys() == {"autoencoder", "recogniser"} and own["recogniser"].is_trained
    assert not parts["recogniser"].is_trained and "vae decoder" not in parts
    # Once on the drawn latents and once on those of the photos, each target alike.
    once = own["recogniser"].forward_flops / tiny.train.recogniser.num_targets * tiny.train.flow.num_targets
    assert parts["recogniser"].forward_flops == pytest.approx(2 * once)


def test_cached_latents_leave_no_encoding_to_a_step(tiny):
    cached = dataclasses.replace(tiny.train.flow, cache_latents=True)
    other = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, flow=cached))
    plain, without = ({p.name: p.forward_flops for p in count_costs("flow", x, "fp32", "none")} for x in (tiny, other))
    assert plain.pop("autoencoder") > without.pop("autoencoder") == 0
    assert plain == without


def test_frozen_parts_are_narrow_only_where_the_run_makes_them_so(tiny_file):
    """The base runs in bf16; encoder and autoencoder stay in fp32."""
    plan = plan_stage("control", tiny_file, overrides=["train.control.precision=bf16"])
    trained, base = plan.trained_parameters, next(part for part in plan.parts if part.name == "base").parameters
    others = plan.parameters - trained - base
    assert plan.memory["none"].weights == 6 * trained + 2 * base + 4 * others


def test_a_frozen_encoder_of_stage_flow_has_no_backward_pass(tiny_file):
    frozen, trained = (
        {part.name: part for part in count_costs("flow", load_preset(tiny_file, [wish]), "fp32", "none")}
        for wish in ("train.flow.encoder_lr_scale=0.0", "train.flow.encoder_lr_scale=1.0")
    )
    assert frozen["tower"].backward_flops == 0 < trained["tower"].backward_flops
    assert not frozen["encoder"].is_trained and trained["encoder"].is_trained


def test_every_block_of_a_base_counts_alike_however_many_there_are(tiny_file):
    """Costs at a depth are drawn from those of a few blocks."""
    flops = []
    for depth in (1, 2, 3, 5):
        sizes = [f"base.sizes.num_double_blocks={depth}", f"base.sizes.num_single_blocks={depth}"]
        flops.append(count_costs("base", load_preset(tiny_file, sizes), "fp32", "none")[-1].forward_flops)
    block = flops[1] - flops[0]
    assert [flops[2] - flops[1], flops[3] - flops[2]] == pytest.approx([block, 2 * block], rel=1e-6)


def test_the_mean_over_photo_counts_is_planned(tiny_file):
    """1 to 3 photos cost on average as much as always 2."""
    drawn, fixed = (
        sum(
            part.forward_flops
            for part in count_costs("mtd", load_preset(tiny_file, [f"train.mtd.num_inputs={n}"]), "fp32", "none")
        )
        for n in ([1, 3], [2, 2])
    )
    assert drawn == pytest.approx(fixed, rel=0.01)


def test_counting_allocates_nothing_and_leaves_torch_alone(tiny):
    before = torch.nn.functional.linear, torch.nn.functional.layer_norm
    parts = count_costs("flow", tiny, "bf16", "selective")
    assert (torch.nn.functional.linear, torch.nn.functional.layer_norm) == before
    assert [part.name for part in parts] == ["tower", "encoder", "autoencoder", "adapter", "base"]
    assert all(parameter.is_meta for part in base_without_weights(tiny.base) for parameter in part.parameters())


def test_command_prints_a_table_or_json_and_needs_no_data(tiny_file):
    command = ["train", "mtd", "--plan", "--preset", str(tiny_file), "--set", "train.mtd.precision=auto"]
    shown = CliRunner().invoke(main, [*command, "--gpus", "2", "--gpu", "rtx4090", "--price", "0.5"])
    assert shown.exit_code == 0, shown.output
    assert (
        "2 x rtx4090, bf16" in shown.output and "identities/s" in shown.output and "at 0.5 per GPU-hour" in shown.output
    )
    asked = CliRunner().invoke(main, [*command, "--json", "--efficiency", "0.2"])
    values = json.loads(asked.stdout)
    assert values["efficiency"] == 0.2 and values["gpu"] == "h200" and values["cost"] is None
    assert values["memory"]["none"]["total"] > values["memory"]["none"]["optimizer"]


@pytest.mark.parametrize("stage", ["base", "control", "t2i", "recogniser", "faces"])
def test_other_stages_are_planned_from_the_command_line_without_warnings(tiny_file, stage):
    shown = CliRunner().invoke(main, ["train", stage, "--plan", "--preset", str(tiny_file)])
    assert shown.exit_code == 0 and shown.stderr == ""
    assert f"{stage}, preset mini, 1 x h200, fp32" in shown.output


def test_without_plan_data_and_run_are_asked_for():
    result = CliRunner().invoke(main, ["train", "mtd", "--run", "somewhere"])
    assert result.exit_code == 2 and "missing option '--data'" in result.output


def test_what_cannot_be_planned_is_said():
    with pytest.raises(OmniIDError, match="not a multiple of 3 GPUs x accumulation 1"):
        plan_stage("mtd", "mini", num_gpus=3)
    for stage in ("base", "recogniser"):
        with pytest.raises(OmniIDError, match=f"stage {stage} needs its batch in one piece"):
            plan_stage(stage, "mini", num_gpus=2)
    with pytest.raises(ConfigError, match=r"preset 'paper' has no \[base.sizes\]"):
        plan_stage("base", "paper")
    with pytest.raises(OmniIDError, match="sizes of the base 'somebody/else' are not known"):
        plan_stage("flow", "paper", overrides=["base.path=somebody/else"])


def test_the_command_offers_all_known_gpus():
    assert set(GPU_NAMES) == set(GPUS)
