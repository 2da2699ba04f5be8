"""GELU into fp8: Triton and the definition against float64 and torch's own GELU, gradients, refusals."""

import pytest
import torch
import torch.nn.functional as F

from omniid.kernels import gelu_fp8 as module
from omniid.kernels._row_tiles import RowTiles
from omniid.kernels.fp8_rows import FP8, dequantize_rows, quantize_rows_reference
from omniid.kernels.gelu_fp8 import gelu_fp8, gelu_fp8_reference

SHAPES = [(1, 1), (257, 33), (2, 3, 131), (0, 8), (7, 1280), (13,)]
FORMS = pytest.mark.parametrize("approximate", ["none", "tanh"])
BOTH = pytest.mark.parametrize("implementation", ["reference", "triton"])


def draw(shape, generator, dtype=torch.float32, device="cpu", with_bias=True):
    """x, which reaches into both tails, and bias or None."""
    x = (torch.randn(shape, generator=generator) * 3).to(device, dtype)
    return x, torch.randn(shape[-1:], generator=generator).to(device, dtype) if with_bias else None


def gradients(x, bias, upstream, dtype, **options):
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, bias) if t is not None]
    return torch.autograd.grad(gelu_fp8(*leaves, **options).carrier, leaves, upstream.to(dtype))


def check(shape, dtype, device, approximate, with_bias, generator, assert_accurate):
    x, bias = draw(shape, generator, dtype, device, with_bias)
    upstream = torch.randn(shape, generator=generator).to(device, dtype)
    kept = [t.clone() for t in (x, bias, upstream) if t is not None]
    rows = gelu_fp8(x, bias, approximate=approximate, implementation="triton")
    exact = F.gelu(x.double() if bias is None else x.double() + bias.double(), approximate=approximate)
    assert rows.values.dtype == FP8 and rows.carrier.dtype == dtype and rows.carrier.shape == x.shape
    expected = quantize_rows_reference(exact)
    torch.testing.assert_close(rows.scales, expected.scales, rtol=1e-5, atol=1e-9)
    if x.numel():  # a value on the edge of two numbers may fall to either; the interpreter rounds some wrongly
        different = (rows.values.float() != expected.values.float()).float().mean()
        assert different < (0.01 if device == "cuda" else 0.1), f"{different:.1%} of the values differ"
    for name, *three in zip(
        ("x", "bias"),
        gradients(x, bias, upstream, dtype, approximate=approximate, implementation="triton"),
        gradients(x, bias, upstream, dtype, approximate=approximate, implementation="reference"),
        gradients(x, bias, upstream, torch.float64, approximate=approximate, implementation="reference"),
        strict=bias is not None,
    ):
        if three[0].numel() > 1:
            assert_accurate(name, *three)
        else:  # the slope of one value may be a difference of larger numbers
            torch.testing.assert_close(
                three[0].double(), three[2], rtol=1e-5 if dtype == torch.float32 else 5e-3, atol=1e-5
            )
    assert all(torch.equal(a, b) for a, b in zip(kept, [t for t in (x, bias, upstream) if t is not None], strict=True))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@FORMS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_is_as_accurate_as_torch(
    shape, approximate, dtype, with_bias, triton_device, poisoned, generator, assert_accurate
):
    check(shape, dtype, triton_device, approximate, with_bias, generator, assert_accurate)


@pytest.mark.gpu
@FORMS
@pytest.mark.parametrize("shape", [*SHAPES, (2056, 5120), (9, 16384)], ids=str)
def test_triton_in_bfloat16(shape, approximate, triton_device, poisoned, generator, assert_accurate):
    check(shape, torch.bfloat16, triton_device, approximate, True, generator, assert_accurate)


@FORMS
def test_definition(approximate, generator):
    x, bias = draw((5, 40), generator)
    rows = gelu_fp8_reference(x, bias, approximate=approximate)
    y = F.gelu(x + bias, approximate=approximate)
    assert torch.equal(rows.carrier, y)
    assert (dequantize_rows(rows, torch.float32) - y).norm() < 5e-2 * y.norm()


@FORMS
def test_gradcheck(approximate, generator):
    x, bias = draw((3, 5), generator, torch.float64)
    run = lambda *leaves: gelu_fp8(*leaves, approximate=approximate).carrier  # noqa: E731
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), bias.requires_grad_()))


@pytest.mark.parametrize("layout", ["unaligned", "transposed", "values apart", "repeated"])
def test_any_layout(layout, triton_device, generator):
    x, bias = draw((9, 12), generator, device=triton_device)
    upstream = torch.randn(9, 12, generator=generator).to(triton_device)

    def changed(t):
        if layout == "unaligned":
            return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
        if layout == "transposed":
            return t.t().contiguous().t()
        if layout == "values apart":
            return t.repeat_interleave(2, dim=-1)[..., ::2]
        return t[:1].expand_as(t)

    x, bias, upstream = (changed(t) for t in (x, bias, upstream))
    results = []
    for implementation in ("triton", "reference"):
        results.append(gradients(x, bias, upstream, torch.float32, implementation=implementation))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    scales = [gelu_fp8(x, bias, implementation=i).scales for i in ("triton", "reference")]
    torch.testing.assert_close(*scales)


def test_several_programs_sum_in_two_stages(triton_device, poisoned, monkeypatch, generator):
    x, bias = draw((19, 12), generator, device=triton_device)
    upstream = torch.randn(19, 12, generator=generator).to(triton_device)
    monkeypatch.setattr(module, "tiles_for", lambda x: RowTiles(2, 16, 6, 4))
    first, second, expected = (
        gradients(x, bias, upstream, torch.float32, implementation=i) for i in ("triton", "triton", "reference")
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for a, b in zip(first, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@BOTH
def test_a_second_backward_and_each_gradient_by_itself(implementation, triton_device, generator):
    leaves = [t.requires_grad_() for t in draw((5, 8), generator, device=triton_device)]
    rows = gelu_fp8(*leaves, implementation=implementation)
    assert not rows.values.requires_grad and not rows.scales.requires_grad
    loss = (rows.carrier * torch.arange(8.0, device=triton_device)).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True))
    for i in range(2):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(leaves)]
        loss = (gelu_fp8(*alone, implementation=implementation).carrier * torch.arange(8.0, device=triton_device)).sum()
        assert torch.equal(torch.autograd.grad(loss, alone[i])[0], first[i])


@BOTH
def test_a_gradient_that_does_not_arrive_leaves_none(implementation, triton_device, generator):
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    leaves = [t.requires_grad_() for t in draw((5, 8), generator, device=triton_device)]
    loss = Cut.apply(gelu_fp8(*leaves, implementation=implementation).carrier).sum()
    assert torch.autograd.grad(loss, leaves, allow_unused=True) == (None, None)


@BOTH
def test_compile_and_export(implementation, triton_device, generator):
    x, bias = draw((5, 8), generator, device=triton_device)

    class Gelu(torch.nn.Module):
        def forward(self, x, bias):
            rows = gelu_fp8(x, bias, approximate="tanh", implementation=implementation)
            return dequantize_rows(rows, torch.float32), rows.carrier * 2

    leaves = [t.requires_grad_() for t in (x, bias)]
    eager, compiled = Gelu()(*leaves), torch.compile(Gelu(), backend="aot_eager", fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, eager)
    grads = [torch.autograd.grad(out[1].sum(), leaves) for out in (eager, compiled)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.export.export(Gelu(), (x, bias)).module()(x, bias)[0], eager[0])


def test_registrations(triton_device, generator):
    leaves = [t.requires_grad_() for t in draw((5, 8), generator, device=triton_device)]
    names = ("test_schema", "test_autograd_registration", "test_faketensor")  # the others add up outputs, fp8 too
    torch.library.opcheck(module._operator, (*leaves, True), test_utils=names)
    x, bias = (t.detach() for t in leaves)
    for with_sum in (False, True):
        names = ("test_schema", "test_faketensor")
        torch.library.opcheck(module._backward_operator, (x * 2, x, bias, False, with_sum), test_utils=names)


def test_refusals(triton_device, monkeypatch):
    x = torch.zeros(3, 4)
    for arguments, options, words in (
        ((torch.zeros(()),), {}, r"rows \(..., C\) of floating numbers, C at least 1; got \(\)"),
        ((torch.zeros(2, 0),), {}, r"got \(2, 0\)"),
        ((x.int(),), {}, r"got \(3, 4\) torch.int32"),
        ((x,), {"approximate": "fast"}, "approximate='fast' is unknown; use 'none' or 'tanh'"),
        ((x, torch.zeros(3)), {}, r"bias must be \(4\) floating numbers as the rows of x, got \(3,\)"),
        ((x, torch.zeros(4).int()), {}, r"got \(4,\) torch.int32"),
        ((x, torch.zeros(4, device="meta")), {}, "x is on cpu but bias on meta"),
        ((x,), {"implementation": "native"}, "gelu_fp8 has no native implementation"),
        ((x.double(),), {"implementation": "triton"}, "gelu_fp8 in Triton takes float32.*got torch.float64"),
        ((torch.zeros(1, 16385),), {"implementation": "triton"}, "rows of up to 16384 values"),
    ):
        if "implementation" in options:
            arguments = [t.to(triton_device) for t in arguments]
        with pytest.raises(ValueError, match=words):
            gelu_fp8(*arguments, **options)
    monkeypatch.setattr("omniid.kernels.fp8_rows.chip_of", lambda x: ((8, 0), 108))
    with pytest.raises(ValueError, match=r"gelu_fp8 in fp8 needs compute capability 8.9 or newer"):
        gelu_fp8(x.to(triton_device), implementation="triton")
