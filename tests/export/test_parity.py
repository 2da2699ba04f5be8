"""Bounds hold or fail, and a report says so."""

import json

import pytest
import torch

from omniid.export.parity import (
    LEAST_COSINE,
    Measure,
    ParityReport,
    adapter_measures,
    encoder_measures,
    psnr,
    transformer_measures,
)


@pytest.fixture
def codes(generator):
    return torch.randn(4, 6, 32, generator=generator)


def holds(measures):
    return all(measure.holds for measure in measures)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_equal_codes_pass_and_noisy_ones_fail(codes, precision, generator):
    assert holds(encoder_measures(codes, codes.clone(), precision))
    noise = torch.randn(codes.shape, generator=generator)
    assert not holds(encoder_measures(codes, codes + 2 * (1 - LEAST_COSINE[precision]) ** 0.5 * noise, precision))


def test_one_wrong_person_among_many_fails(codes):
    wrong = codes.clone()
    wrong[2] = wrong[2].roll(1, 0)
    assert not holds(encoder_measures(codes, wrong, "fp8"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_fails(codes, value):
    wrong = codes.clone()
    wrong[0, 0, 0] = value
    assert not holds(encoder_measures(codes, wrong, "fp8"))


def test_one_wrong_block_of_an_adapter_fails(generator):
    keys, values = torch.randn(2, 3, 1, 4, 2, 8, generator=generator)
    assert holds(adapter_measures((keys, values), (keys, values), "fp32"))
    wrong = values.clone()
    wrong[1] = 0
    assert not holds(adapter_measures((keys, values), (keys, wrong), "fp8"))


def test_values_that_are_zero_must_stay_zero(generator):
    keys, zeros = torch.randn(3, 1, 4, 2, 8, generator=generator), torch.zeros(3, 1, 4, 2, 8)
    assert holds(adapter_measures((keys, zeros), (keys, zeros), "fp32"))
    assert not holds(adapter_measures((keys, zeros), (keys, zeros + 1e-3), "fp8"))


def test_errors_of_steps_add_up(generator):
    velocities = torch.randn(3, 2, 16, 4, generator=generator)

    def steps(factor):
        latents = torch.ones(2, 16, 4)
        for index, velocity in enumerate(velocities):
            latents = latents - factor * velocity / 3
            yield {"index": index}, velocity, latents

    measures, latents, own = transformer_measures(
        steps(1.0), lambda i: velocities[i["index"]] * 1.1, steps(1.1), "fp32"
    )
    first, last = measures[1].value, measures[2].value
    assert holds(measures) and 0 < first < last
    assert psnr(latents, latents) > 100 > psnr(latents, own)


def test_a_report_is_a_table_and_json():
    report = ParityReport("a.onnx", "adapter", "fp8", [Measure("cosine", 0.9, at_least=0.995), Measure("error", 0.1)])
    assert not report.passed
    assert "FAILED" in str(report) and "fails" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["measures"][0]["holds"] is False
