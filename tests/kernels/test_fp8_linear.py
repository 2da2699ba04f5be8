"""Linear layer in fp8: the definition by hand, gradients, rows that are rounded already, frozen weights, refusals.

`_scaled_mm` runs on a CPU too where torch is new enough, which checks how it is called; its speed and bf16 are a GPU's.
"""

import pytest
import torch
import torch.nn.functional as F

from omniid.kernels import fp8_linear as module
from omniid.kernels.fp8_linear import fp8_linear, fp8_linear_reference, quantize_weight
from omniid.kernels.fp8_rows import dequantize_rows, quantize_rows
from omniid.kernels.gelu_fp8 import gelu_fp8
from omniid.kernels.layer_norm_modulate import layer_norm_modulate

# (rows, K, N)
SHAPES = [((1,), 1, 1), ((257,), 33, 5), ((2, 13), 64, 48), ((0,), 8, 4), ((), 7, 3)]


def draw(shape, generator, dtype=torch.float32, device="cpu"):
    rows, k, n = shape
    x = torch.randn(*rows, k, generator=generator).to(device, dtype)
    weight = (torch.randn(n, k, generator=generator) * k**-0.5).to(device, dtype)
    return x, weight, torch.randn(n, generator=generator).to(device, dtype)


def rounded(x):
    """x after a round trip through fp8, in float64, by a loop over rows that shares nothing with the code under test."""
    rows = []
    for row in x.double().reshape(-1, x.shape[-1]):
        scale = row.abs().max().clamp(min=1e-30) / 448
        rows.append((row / scale).float().to(torch.float8_e4m3fn).double() * scale)
    return torch.stack(rows).view(x.shape) if rows else x.double()


def expected(x, weight, bias, upstream):
    """y and the gradients of x, weight and bias in float64."""
    flat, up = rounded(x).flatten(0, -2) if x.dim() > 1 else rounded(x)[None], upstream.double()
    up_flat = up.reshape(-1, up.shape[-1])
    y = F.linear(rounded(x), rounded(weight), bias.double())
    return y, rounded(upstream) @ rounded(weight.t()).t(), up_flat.t() @ flat, up_flat.sum(0)


def outputs(x, weight, bias, upstream, function=fp8_linear):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, upstream)


def assert_close(results, exact, tolerance):
    """Both ways of writing x / scale may fall to different fp8 numbers in a few places."""
    for name, got, wanted in zip(("y", "x", "weight", "bias"), results, exact, strict=True):
        assert got.shape == wanted.shape, name
        error = (got.double() - wanted).norm()
        assert error <= tolerance * wanted.norm() + 1e-12, f"{name}: error {error:.3g} of {wanted.norm():.3g}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_by_hand(shape, generator):
    inputs = draw(shape, generator)
    upstream = torch.randn(*shape[0], shape[2], generator=generator)
    kept = [t.clone() for t in (*inputs, upstream)]
    results = outputs(*inputs, upstream)
    assert_close(results, expected(*inputs, upstream), 1e-3)
    assert torch.equal(results[0], fp8_linear_reference(*inputs))
    assert all(torch.equal(a, b) for a, b in zip(kept, (*inputs, upstream), strict=True))


def test_costs_what_its_rounding_costs(generator):
    inputs = draw(((40,), 64, 48), generator)
    upstream = torch.randn(40, 48, generator=generator)
    plain = outputs(*inputs, upstream, function=F.linear)
    for name, got, wanted in zip(("y", "x", "weight", "bias"), outputs(*inputs, upstream), plain, strict=True):
        assert (got - wanted).norm() < 5e-2 * wanted.norm(), name


def test_scaled_mm_on_a_cpu(generator):
    x, weight, bias = draw(((2, 13), 64, 48), generator, torch.bfloat16)
    upstream = torch.randn(2, 13, 48, generator=generator).bfloat16()
    rows = quantize_rows(x)
    try:
        torch._scaled_mm(
            rows.values[0], rows.values[0, :16].t(), scale_a=torch.ones(13, 1), scale_b=torch.ones(1, 13),
            out_dtype=torch.bfloat16,
        )  # fmt: skip
    except RuntimeError as error:
        pytest.skip(f"torch {torch.__version__} has no products of fp8 rows on a CPU: {error}")

    def run(x, weight, bias):
        return module._operator(x, rows.values, rows.scales, weight, *[None] * 4, bias, x.dtype, "torch")

    results = outputs(x, weight, bias, upstream, function=run)
    assert all(t.dtype == torch.bfloat16 for t in results)
    assert_close(results, expected(x, weight, bias, upstream), 1e-2)
    empty = module._product(rows.values[:0], rows.scales[:0], *quantize_rows(weight)[:2], None, torch.float32, "torch")
    assert empty.shape == (0, 13, 48)
    assert empty.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["auto", "triton"])
@pytest.mark.parametrize(
    "shape", [((2, 257), 1280, 3840), ((2056,), 1280, 5120), ((1,), 64, 48), ((0,), 64, 48)], ids=str
)
def test_on_a_gpu(shape, implementation, triton_device, poisoned, generator):
    inputs = draw(shape, generator, torch.bfloat16, triton_device)
    upstream = torch.randn(*shape[0], shape[2], generator=generator).to(triton_device, torch.bfloat16)
    run = lambda *leaves: fp8_linear(*leaves, implementation=implementation)  # noqa: E731
    reference = lambda *leaves: fp8_linear(*leaves, implementation="reference")  # noqa: E731
    results = outputs(*inputs, upstream, function=run)
    assert all(torch.equal(a, b) for a, b in zip(results, outputs(*inputs, upstream, function=run), strict=True))
    exact = outputs(*(t.float() for t in inputs), upstream.float(), function=reference)
    assert_close(results, [t.double() for t in exact], 1e-2)


def test_rows_that_are_rounded_already(generator):
    x, weight, bias = (t.requires_grad_() for t in draw(((6,), 16, 8), generator))
    for make in (quantize_rows, lambda t: layer_norm_modulate(t, quantize=True), gelu_fp8):
        rows = make(x)
        y = fp8_linear(rows, weight, bias)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, fp8_linear_reference(dequantize_rows(rows, torch.float32), weight, bias))
        upstream = torch.randn(6, 8, generator=generator)
        dx, dw = torch.autograd.grad(y, (x, weight), upstream)
        dy = rounded(upstream) @ rounded(weight.detach().t()).t()
        (wanted,) = torch.autograd.grad(make(x).carrier, x, dy.float())
        torch.testing.assert_close(dx, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dw, upstream.t() @ dequantize_rows(rows, torch.float32))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_frozen_weights(implementation, triton_device, generator):
    x, weight, bias = (t.to(triton_device) for t in draw(((6,), 16, 8), generator))
    frozen = quantize_weight(weight, implementation=implementation)
    assert frozen.rows.carrier.untyped_storage().nbytes() == 4
    assert frozen.rows.values.shape == (8, 16)
    assert frozen.columns.values.shape == (16, 8)
    if implementation == "triton":
        return  # the interpreter rounds some values wrongly; test_on_a_gpu compares products
    x.requires_grad_()
    results = [fp8_linear(x, w, bias) for w in (weight, frozen)]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in results))


def test_a_second_backward_and_each_gradient_by_itself(generator):
    leaves = [t.requires_grad_() for t in draw(((6,), 16, 8), generator)]
    loss = fp8_linear(*leaves).square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True))
    for i in range(3):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(leaves)]
        assert torch.equal(torch.autograd.grad(fp8_linear(*alone).square().sum(), alone[i])[0], first[i])


@pytest.mark.parametrize("layout", ["unaligned", "transposed", "repeated"])
def test_any_layout(layout, generator):
    inputs, upstream = draw(((12,), 12, 12), generator), torch.randn(12, 12, generator=generator)

    def changed(t):
        if layout == "unaligned":
            return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
        if layout == "transposed":
            return t.t().contiguous().t()
        return t[:1].expand_as(t)

    inputs, upstream = [changed(t) for t in inputs], changed(upstream)
    assert_close(outputs(*inputs, upstream), expected(*inputs, upstream), 1e-3)


def test_autocast_and_float64(generator):
    x, weight, bias = draw(((6,), 16, 8), generator)
    with torch.autocast("cpu", torch.bfloat16):
        y = fp8_linear(x.requires_grad_(), weight, bias)
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.sum(), x)[0].dtype == torch.float32
    y = fp8_linear(x.double(), weight.double(), bias.double())
    assert y.dtype == torch.float64
    torch.testing.assert_close(y.float(), fp8_linear_reference(x, weight, bias))


def test_registrations(generator):
    x, weight, bias = (t.requires_grad_() for t in draw(((6,), 16, 8), generator))
    rows = quantize_rows(x)
    frozen = quantize_weight(weight)
    names = ("test_autograd_registration", "test_faketensor")  # test_schema compares inputs, which it cannot in fp8
    for parts in ((weight, *[None] * 4), (None, *frozen.rows[:2], *frozen.columns[:2])):
        arguments = (x, rows.values, rows.scales, *parts, bias, torch.float32, "reference")
        torch.library.opcheck(module._operator, arguments, test_utils=names)
    for for_x, for_weight in ((True, True), (True, False), (False, True)):
        arguments = (
            torch.ones(6, 8), rows.values, rows.scales, weight.detach(), None, None, for_x, for_weight, torch.float32,
            "reference",
        )  # fmt: skip
        torch.library.opcheck(module._backward_operator, arguments, test_utils="test_faketensor")


def test_compile_and_export(generator):
    x, weight, bias = draw(((6,), 16, 8), generator)

    class Layers(torch.nn.Module):
        def forward(self, x, weight, bias):
            return fp8_linear(layer_norm_modulate(x, quantize=True), weight, bias)

    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    eager, compiled = Layers()(*leaves), torch.compile(Layers(), backend="aot_eager", fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, eager)
    grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (eager, compiled)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.export.export(Layers(), (x, weight, bias)).module()(x, weight, bias), eager)


def test_refusals():
    x, weight, bias = torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(2)
    rows = quantize_rows(x)
    for arguments, options, words in (
        (
            (x[:, 1:], weight),
            {},
            r"x must be \(..., K\) and weight \(N, K\), both at least 1; got \(3, 3\) and \(2, 4\)",
        ),
        ((x, weight[0]), {}, r"got \(3, 4\) and \(4,\)"),
        ((x[:, :0], weight[:, :0]), {}, "both at least 1"),
        ((x, weight, bias[1:]), {}, r"bias must be \(2\) as the rows of weight, got \(1,\)"),
        ((x, weight.int()), {}, r"weight is torch.int32; convert"),
        ((x, weight, bias.to("meta")), {}, "x is on cpu but bias on meta"),
        ((rows._replace(values=x), weight), {}, r"x must hold values \(..., K\) in torch.float8_e4m3fn"),
        ((rows._replace(scales=rows.scales[1:]), weight), {}, r"scales \(...\) in float32 and a carrier.*\(2,\)"),
        ((x, weight), {"implementation": "native"}, "fp8_linear has no native implementation"),
    ):
        with pytest.raises(ValueError, match=words):
            fp8_linear(*arguments, **options)


def test_where_fp8_cannot_run_it_is_refused(triton_device, monkeypatch):
    if triton_device == "cpu":
        with pytest.raises(ValueError, match="fp8 on CUDA tensors only, the inputs are on cpu"):
            fp8_linear(torch.zeros(3, 16), torch.zeros(16, 16), implementation="triton")

    class OnCuda:  # what the choice looks at, of a tensor on a GPU
        is_cuda, device = True, torch.device("cuda")

    monkeypatch.setattr("omniid.kernels.fp8_rows.chip_of", lambda x: ((8, 0), 108))
    with pytest.raises(ValueError, match=r"fp8_linear in fp8 needs compute capability 8.9 or newer, cuda has 8.0"):
        module._chosen(OnCuda(), (16, 16), None)
    monkeypatch.setattr("omniid.kernels.fp8_rows.chip_of", lambda x: ((9, 0), 132))
    assert module._chosen(OnCuda(), (16, 32), "auto") == "torch"
    assert module._chosen(OnCuda(), (16, 32), "triton") == "triton"
    assert module._chosen(OnCuda(), (5, 7), "reference") == "reference"
    with pytest.raises(ValueError, match=r"weights \(N, K\) of multiples of 16, got \(16, 40\)"):
        module._chosen(OnCuda(), (16, 40), None)
