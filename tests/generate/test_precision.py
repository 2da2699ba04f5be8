"""Which precision and place are chosen, and the plan they rest on."""

import numpy as np
import pytest
import torch

from omniid.generate import GenerateError, load_generator
from omniid.generate.peak_memory import peak_bytes
from omniid.generate.plan import plan_generation, table
from omniid.generate.precision import bitsandbytes_settings, check_fp8, choose_placement, fitting
from omniid.models.fp8 import freeze_in_fp8

NEEDS = {
    ("bf16", "none"): 36e9, ("bf16", "model"): 24e9, ("bf16", "sequential"): 2e9,
    ("nf4", "none"): 12e9, ("nf4", "model"): 7e9, ("fp8", "none"): 28e9,
}  # fmt: skip


@pytest.mark.parametrize(
    ("free", "precision", "offload", "has_bitsandbytes", "expected"),
    [
        (80e9, "auto", "auto", True, ("bf16", "none")),
        (30e9, "auto", "auto", True, ("bf16", "model")),
        (24e9, "auto", "auto", True, ("nf4", "none")),
        (24e9, "auto", "auto", False, ("bf16", "sequential")),
        (9e9, "auto", "auto", True, ("nf4", "model")),
        (4e9, "auto", "auto", True, ("bf16", "sequential")),
        (80e9, "auto", "model", True, ("bf16", "model")),
        (80e9, "nf4", "auto", True, ("nf4", "none")),
        (9e9, "nf4", "auto", True, ("nf4", "model")),
    ],
)
def test_the_best_that_fits_is_chosen(free, precision, offload, has_bitsandbytes, expected):
    placement = fitting(NEEDS, free, precision, offload, has_bitsandbytes)
    assert (placement.precision, placement.offload) == expected and placement.dtype == torch.bfloat16
    assert f"of the {free / 1e9:.1f} GB free" in placement.reason


def test_the_reason_names_what_did_not_fit():
    reason = fitting(NEEDS, 24e9, "auto", "auto", has_bitsandbytes=False).reason
    assert "bf16 without offload would need 37.0 GB" in reason and "nf4 would need bitsandbytes" in reason
    with pytest.raises(
        GenerateError, match=r"nothing that was asked for fits the 1.0 GB .*sequential offload would need 3.0"
    ):
        fitting(NEEDS, 1e9, "auto", "auto", has_bitsandbytes=True)


def test_without_a_gpu_only_what_runs_there(drawing_weights):
    cpu = torch.device("cpu")
    assert choose_placement("any", "auto", "auto", cpu).dtype == torch.float32
    assert choose_placement("any", "bf16", "none", cpu).precision == "bf16"
    assert choose_placement("any", "auto", "auto", cpu, torch.bfloat16).dtype == torch.bfloat16
    refused = {
        ("fp8", "auto"): "compute capability 8.9",
        ("auto", "sequential"): "use none",
        ("int4", "auto"): "'int4' is unknown; use one of: auto",
        ("auto", "disk"): "'disk' is unknown",
    }
    for wish, words in refused.items():
        with pytest.raises(GenerateError, match=words):
            choose_placement("any", *wish, cpu)


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp32"])
def test_on_a_gpu_the_plan_decides(drawing_weights, monkeypatch, precision):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24e9, 24e9))
    placement = choose_placement(drawing_weights / "base", precision, "auto", torch.device("cuda"))
    assert (placement.precision, placement.offload) == ("bf16" if precision == "auto" else precision, "none")


def test_fp8_is_refused_by_what_the_gpu_is():
    with pytest.raises(GenerateError, match=r"capability 8.9 or newer, this one has 8.0; use bf16 or nf4"):
        check_fp8((8, 0))


def test_a_transformer_in_fp8_draws_nearly_the_same(drawing_weights):
    wanted, rounded = (load_generator(drawing_weights) for _ in range(2))
    assert freeze_in_fp8(rounded.pipeline.transformer) > 0
    before, after = (np.asarray(one.generate(None, "photo of a person", seed=1)[0], float) for one in (wanted, rounded))
    assert 0 < np.abs(before - after).mean() < 8


def test_four_bit_settings_are_those_of_both_libraries():
    pytest.importorskip("bitsandbytes")
    mapping = bitsandbytes_settings().quant_mapping
    assert set(mapping) == {"transformer", "text_encoder_2"}
    for settings in mapping.values():
        assert settings.load_in_4bit and settings.bnb_4bit_quant_type == "nf4" and settings.bnb_4bit_use_double_quant


def test_peak_memory_counts_what_is_alive_at_once():
    x = torch.empty(1024, device="meta")  # 4 KiB, made outside

    def chain():
        y = x + 1
        z = y * 2
        del y
        return (z + 1).view(32, 32)

    assert peak_bytes(chain) == 2 * 4096
    assert peak_bytes(lambda: x.add_(1)) == 0
    q = torch.empty(1, 2, 1000, 64, device="meta")
    attend = torch.nn.functional.scaled_dot_product_attention
    assert peak_bytes(lambda: attend(q, q, q)) == q.numel() * 4  # no scores


@pytest.mark.slow
def test_flux_1_dev_has_the_paper_sizes_and_fits_where_others_measured_it():
    plan = plan_generation("black-forest-labs/FLUX.1-dev")
    assert plan.num_patched_blocks == 57 and plan.kv_shape == (57, 1, 256, 24, 128)
    assert round(plan.adapter_parameters / 1e6) == 448 and round(plan.kv_bytes / 1e6) == 179
    assert [round(part.parameters / 1e6) for part in plan.parts] == [11901, 4762, 123, 84]
    needs = {(row.precision, row.offload): row for row in plan.rows}
    # NVIDIA's TensorRT demo quotes 35.7 GB for bf16 without an adapter.
    assert 33e9 < needs["bf16", "none"].bytes < 39e9 and needs["bf16", "none"].cards == ["l40s", "a100/h100", "h200"]
    assert needs["nf4", "model"].bytes < 16e9
    assert "57 blocks patched; cached keys and values: 256 x 57" in table(plan)


def resident(plan) -> dict[str, float]:
    return {row.precision: row.bytes for row in plan.rows if row.offload == "none"}


SMALL = {"width": 32, "height": 32, "num_tokens": 6, "code_width": 32}


def test_a_folders_plan_counts_its_parts(drawing_weights, generator):
    plan = plan_generation(drawing_weights / "base", **SMALL)
    counts = [sum(p.numel() for p in part.parameters()) for part in (
        generator.pipeline.transformer, generator.pipeline.text_encoder_2, generator.pipeline.text_encoder, generator.pipeline.vae
    )]  # fmt: skip
    assert [part.parameters for part in plan.parts] == counts
    assert plan.adapter_parameters == sum(p.numel() for p in generator.adapter.parameters())
    needs = resident(plan)
    assert needs["nf4"] < needs["bf16"] and needs["fp8"] < needs["bf16"]
    by_way = [row.bytes for row in plan.rows if row.precision == "bf16"]
    assert by_way == sorted(by_way, reverse=True)


def test_more_pictures_people_and_controls_need_more(controlled_weights, controlled):
    base = controlled_weights / "base"
    one = plan_generation(base, **SMALL)
    larger = plan_generation(base, **SMALL | {"width": 64})
    assert larger.decode_bytes == 2 * one.decode_bytes and larger.step_bytes > one.step_bytes
    several = plan_generation(base, **SMALL, num_images=3)
    assert several.decode_bytes == 3 * one.decode_bytes and several.step_bytes > 2 * one.step_bytes
    assert several.kv_bytes == one.kv_bytes
    assert plan_generation(base, **SMALL, num_identities=2).kv_bytes == 2 * one.kv_bytes
    steered = plan_generation(base, **SMALL, controlnet=controlled_weights / "controlnet")
    weights = sum(p.numel() for p in controlled.pipelines.controlnet.parameters())
    assert steered.parts[-1].name == "ControlNet" and steered.parts[-1].parameters == weights
    assert resident(steered)["bf16"] >= resident(one)["bf16"] + 2 * weights
    wide = SMALL | {"width": 1024, "height": 512}
    assert plan_generation(base, **wide, tiling=True).decode_bytes < plan_generation(base, **wide).decode_bytes


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the hub, which cannot be reached."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_hub_name_is_planned_from_the_configurations_in_the_cache(drawing_weights, hub_cache):
    repository = hub_cache / "models--somebody--tuned"
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        folder = repository / "snapshots" / "1" / part
        folder.mkdir(parents=True)
        (folder / "config.json").write_bytes((drawing_weights / "base" / part / "config.json").read_bytes())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1")
    here, there = (plan_generation(base, **SMALL) for base in (drawing_weights / "base", "somebody/tuned"))
    assert there.rows == here.rows and there.parts == here.parts


@pytest.mark.slow
def test_schnell_is_known_without_its_files():
    dev, schnell = (plan_generation(f"black-forest-labs/FLUX.1-{name}") for name in ("dev", "schnell"))
    # The guidance embedding, a layer 256 -> 3072 and one 3072 -> 3072, is all that dev has more.
    assert dev.parts[0].parameters - schnell.parts[0].parameters == 3072 * (256 + 1) + 3072 * (3072 + 1)
    assert schnell.num_patched_blocks == 57 and schnell.adapter_parameters == dev.adapter_parameters


@pytest.mark.parametrize("fetch", [False, True])
def test_bases_of_unknown_sizes_have_no_plan(hub_cache, fetch):
    with pytest.raises(
        GenerateError, match=r"the sizes of the base 'somebody/else' are not known .* with --base FOLDER"
    ):
        plan_generation("somebody/else", fetch=fetch)


def test_another_architecture_has_no_plan(drawing_weights, tmp_path):
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text('{"_class_name": "Flux2Transformer2DModel"}')
    with pytest.raises(GenerateError, match=r"is no FLUX.1: its transformer is a Flux2Transformer2DModel"):
        plan_generation(tmp_path)
