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


def test_a_folders_plan_counts_its_parts(drawing_weights, generator):
    plan = plan_generation(drawing_weights / "base", size=32, num_tokens=6, width=32)
    counts = [sum(p.numel() for p in part.parameters()) for part in (
        generator.pipeline.transformer, generator.pipeline.text_encoder_2, generator.pipeline.text_encoder, generator.pipeline.vae
    )]  # fmt: skip
    assert [part.parameters for part in plan.parts] == counts
    assert plan.adapter_parameters == sum(p.numel() for p in generator.adapter.parameters())
    resident = {row.precision: row.bytes for row in plan.rows if row.offload == "none"}
    assert resident["nf4"] < resident["bf16"] and resident["fp8"] < resident["bf16"]
    by_way = [row.bytes for row in plan.rows if row.precision == "bf16"]
    assert by_way == sorted(by_way, reverse=True)


def test_bases_of_unknown_sizes_have_no_plan():
    with pytest.raises(GenerateError, match="the sizes of the base 'somebody/else' are not known without its files"):
        plan_generation("somebody/else")
