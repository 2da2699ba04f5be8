"""Rows in e4m3: what the definition promises, Triton against it, carriers, refusals."""

import pytest
import torch

from omniid.kernels import fp8_rows as module
from omniid.kernels._row_tiles import RowTiles, row_tiles
from omniid.kernels.fp8_rows import FP8, LARGEST, dequantize_rows, quantize_rows, quantize_rows_reference

SHAPES = [(1, 1), (1,), (3, 257), (2, 5, 33), (131, 7), (0, 6), (65, 1280)]


def draw(shape, generator, dtype=torch.float32):
    """Rows whose sizes differ by orders of magnitude."""
    x = torch.randn(shape, generator=generator)
    return (x * torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (x.dim() - 1)) if x.numel() else x).to(dtype)


def assert_same_rows(got, expected):
    """Equal scales, and equal values but for a rounding that the interpreter takes wrongly in a few of a hundred."""
    torch.testing.assert_close(got.scales, expected.scales, rtol=1e-6, atol=0)
    assert got.values.dtype == FP8 and got.values.shape == expected.values.shape
    if got.values.numel():
        wrong = (got.values.float() != expected.values.float()).float().mean()
        assert wrong <= (0.001 if got.values.is_cuda else 0.1), f"{wrong:.1%} of the values differ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(shape, dtype, generator):
    x = draw(shape, generator, dtype)
    kept = x.clone()
    rows = quantize_rows_reference(x)
    assert rows.values.dtype == FP8 and rows.scales.shape == shape[:-1] and rows.carrier is x
    assert (rows.values.float().abs().amax(-1) == LARGEST).all(), "the largest value of a row is the largest number"
    error = (dequantize_rows(rows, torch.float32) - x.float()).abs()
    # Half of a step of 1/8, and the smallest step of all near zero.
    assert (error <= x.float().abs() / 16 + rows.scales.unsqueeze(-1) * 2**-10).all()
    assert torch.equal(x, kept)


def test_values_lie_row_by_row_whatever_the_strides(generator):
    """cuBLAS refuses other layouts: the backward of `fp8_linear` rounds the columns of a weight."""
    x = draw((9, 12), generator)
    for rows in (quantize_rows_reference(x.t()), quantize_rows(x.t(), implementation="reference")):
        assert rows.values.is_contiguous()
        assert torch.equal(rows.values.float(), quantize_rows_reference(x.t().contiguous()).values.float())


def test_zeros_and_what_is_not_finite():
    rows = quantize_rows_reference(torch.tensor([[0.0, -0.0], [torch.nan, 1.0], [torch.inf, 1.0]]))
    assert torch.equal(dequantize_rows(rows, torch.float32)[0], torch.zeros(2))
    assert rows.scales[0] > 0
    assert dequantize_rows(rows, torch.float32)[1:, 0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_against_the_definition(shape, dtype, triton_device, poisoned, generator):
    x = draw(shape, generator, dtype).to(triton_device)
    assert_same_rows(quantize_rows(x, implementation="triton"), quantize_rows_reference(x))


@pytest.mark.parametrize("layout", ["unaligned", "transposed", "values apart", "repeated"])
def test_any_layout(layout, triton_device, generator):
    x = draw((9, 12), generator).to(triton_device)
    if layout == "unaligned":
        x = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    elif layout == "transposed":
        x = x.t().contiguous().t()
    elif layout == "values apart":
        x = x.repeat_interleave(2, dim=-1)[:, ::2]
    else:
        x = x[:1].expand_as(x)
    assert_same_rows(quantize_rows(x, implementation="triton"), quantize_rows_reference(x))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (2056, 5120)], ids=str)
def test_triton_in_bfloat16(shape, triton_device, poisoned, generator):
    x = draw(shape, generator, torch.bfloat16).to(triton_device)
    assert_same_rows(quantize_rows(x, implementation="triton"), quantize_rows_reference(x))


def test_registration_and_compilation(triton_device, generator):
    x = draw((4, 6), generator).to(triton_device)
    torch.library.opcheck(module._operator, (x,))
    for implementation in ("reference", "triton"):
        run = torch.compile(quantize_rows, backend="aot_eager", fullgraph=True)
        values, scales, _ = run(x, implementation=implementation)
        assert_same_rows(module.Fp8Rows(values, scales, x), quantize_rows_reference(x))


def test_refusals(triton_device):
    for x, options, words in (
        (torch.tensor(1.0), {}, r"rows \(..., C\) of floating numbers, C at least 1; got \(\)"),
        (torch.zeros(3, 0), {}, r"got \(3, 0\)"),
        (torch.zeros(3, 2, dtype=torch.int64), {}, r"got \(3, 2\) torch.int64"),
        (torch.zeros(3, 2), {"implementation": "native"}, "quantize_rows has no native implementation"),
        (torch.zeros(3, 2).double(), {"implementation": "triton"}, "float32, float16 and bfloat16, got torch.float64"),
        (torch.zeros(1, 16385), {"implementation": "triton"}, "rows of up to 16384 values, got 16385"),
    ):
        with pytest.raises(ValueError, match=words):
            quantize_rows(x.to(triton_device), **options)


def test_chips_without_fp8_are_refused(triton_device, monkeypatch):
    monkeypatch.setattr(module, "chip_of", lambda x: ((8, 6), 84))
    with pytest.raises(ValueError, match=r"quantize_rows in fp8 needs compute capability 8.9 or newer, .* has 8.6"):
        quantize_rows(torch.zeros(2, 3, device=triton_device), implementation="triton")


def test_tiles_follow_from_sizes():
    sizes = {"num_rows": 24672, "width": 1280}
    assert row_tiles(**sizes, capability=(9, 0)) == RowTiles(1, 2048, 47, 4)
    assert row_tiles(**sizes | {"width": 192}, capability=(9, 0)) == RowTiles(8, 256, 48, 4)
    assert row_tiles(**sizes | {"width": 5120}, capability=(9, 0)).num_warps == 16
    assert row_tiles(**sizes | {"width": 5120}, capability=(12, 0)).num_warps == 8
    assert row_tiles(num_rows=257, width=1280, num_groups=96, capability=(9, 0)) == RowTiles(1, 2048, 52, 4)
    assert row_tiles(num_rows=0, width=1, capability=(9, 0)).rows_per_program == 0
    assert row_tiles(**sizes, capability=None) == RowTiles(64, 2048, 24704, 4)
