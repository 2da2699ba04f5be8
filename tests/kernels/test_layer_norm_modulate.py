"""LayerNorm with addition, modulation and fp8 output: Triton and the definition against float64, gradients, refusals."""

import pytest
import torch

from omniid.kernels import layer_norm_modulate as module
from omniid.kernels._row_tiles import RowTiles
from omniid.kernels.fp8_rows import FP8, dequantize_rows, quantize_rows_reference
from omniid.kernels.layer_norm_modulate import (
    add_layer_norm,
    layer_norm_modulate,
)

# (shape, which of the optional inputs)
CASES = [
    ((1, 1), "weight bias"),
    ((257, 33), "residual weight bias"),
    ((2, 131, 48), "residual weight bias shift scale"),
    ((3, 7, 5, 20), "shift scale"),
    ((5, 1280), "weight"),
    ((11, 16), "residual"),
    ((4, 9, 31), "bias shift scale"),
    ((0, 4, 8), "residual weight bias shift scale"),
    ((2, 0, 8), "weight bias shift scale"),
    ((13,), "weight bias"),
]


def draw(shape, which, generator, dtype=torch.float32, device="cpu"):
    """x and the other inputs by name, none of them near 1 or 0 on average."""
    inputs = {"x": torch.randn(shape, generator=generator) * 2 + 0.7}
    for name in which.split():
        of = {"residual": shape, "weight": shape[-1:], "bias": shape[-1:]}.get(name, (shape[0], shape[-1]))
        inputs[name] = torch.randn(of, generator=generator) + 0.3
    return {name: value.to(device, dtype) for name, value in inputs.items()}


def call(inputs, **options):
    """(sum, normed) or (normed,)."""
    inputs = dict(inputs)
    if "residual" in inputs:
        return add_layer_norm(inputs.pop("x"), inputs.pop("residual"), **inputs, **options)
    return (layer_norm_modulate(inputs.pop("x"), **inputs, **options),)


def outputs_and_gradients(inputs, upstreams, dtype, implementation):
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    outs = call(leaves, implementation=implementation)
    grads = torch.autograd.grad(outs, list(leaves.values()), [u.to(dtype) for u in upstreams[-len(outs) :]])
    return [x.detach() for x in outs], list(grads)


def check(case, dtype, device, generator, assert_accurate):
    shape, which = case
    inputs = draw(shape, which, generator, dtype, device)
    upstreams = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2)]
    kept = [x.clone() for x in (*inputs.values(), *upstreams)]
    results = [
        outputs_and_gradients(inputs, upstreams, *how)
        for how in ((dtype, "triton"), (dtype, "reference"), (torch.float64, "reference"))
    ]
    names = [*("sum", "normed")[-len(results[0][0]) :], *(f"grad {name}" for name in inputs)]
    for name, *three in zip(names, *(outs + grads for outs, grads in results), strict=True):
        assert_accurate(name, *three)
    assert all(torch.equal(a, b) for a, b in zip(kept, (*inputs.values(), *upstreams), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_is_as_accurate_as_torch(case, dtype, triton_device, poisoned, generator, assert_accurate):
    check(case, dtype, triton_device, generator, assert_accurate)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, ((8, 257, 1280), "residual weight bias shift scale")], ids=str)
def test_triton_in_bfloat16(case, triton_device, poisoned, generator, assert_accurate):
    check(case, torch.bfloat16, triton_device, generator, assert_accurate)


def test_definition_by_hand(generator):
    inputs = draw((2, 3, 5), "weight bias shift scale", generator, torch.float64)
    (normed,) = call(inputs, eps=1e-3)
    for b in range(2):
        for r in range(3):
            x = inputs["x"][b, r]
            n = (x - x.mean()) / (x.var(correction=0) + 1e-3).sqrt()
            y = (n * inputs["weight"] + inputs["bias"]) * (1 + inputs["scale"][b]) + inputs["shift"][b]
            torch.testing.assert_close(normed[b, r], y)


@pytest.mark.parametrize("quantize", [False, True], ids=["wide", "fp8"])
def test_gradcheck(quantize, generator):
    inputs = draw((2, 3, 5), "residual weight bias shift scale", generator, torch.float64)

    def run(*leaves):
        total, normed = call(dict(zip(inputs, leaves, strict=True)), quantize=quantize)
        return total, normed.carrier if quantize else normed

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs.values()])


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[7]], ids=str)
def test_fp8_rows(case, implementation, triton_device, poisoned, generator):
    inputs = draw(*case, generator, device=triton_device)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    rows = call(leaves, quantize=True, implementation=implementation)[-1]
    wide = call(leaves, implementation="reference")[-1]
    assert rows.values.dtype == FP8 and rows.values.shape == rows.carrier.shape == wide.shape
    assert not rows.values.requires_grad and not rows.scales.requires_grad and rows.carrier.requires_grad
    torch.testing.assert_close(rows.scales, quantize_rows_reference(wide).scales, rtol=1e-4, atol=0)
    exact = quantize_rows_reference(wide).values.float()
    if exact.numel():  # a value on the edge of two numbers may fall to either; the interpreter rounds some wrongly
        assert (rows.values.float() != exact).float().mean() < 0.1
    upstream = torch.randn(wide.shape, generator=generator).to(triton_device)
    expected = torch.autograd.grad(wide, list(leaves.values()), upstream)
    for name, a, b in zip(
        leaves, torch.autograd.grad(rows.carrier, list(leaves.values()), upstream), expected, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.gpu
def test_fp8_costs_what_its_rounding_costs(triton_device, generator):
    inputs = draw((8, 257, 1280), "residual weight bias", generator, torch.bfloat16, triton_device)
    rows = call(inputs, quantize=True, implementation="triton")[-1]
    exact = call({name: x.double() for name, x in inputs.items()}, implementation="reference")[-1]
    assert (dequantize_rows(rows, torch.float64) - exact).norm() < 5e-2 * exact.norm()


@pytest.mark.parametrize("layout", ["unaligned", "transposed", "values apart", "repeated"])
def test_any_layout(layout, triton_device, generator):
    inputs = draw((6, 5, 12), "residual weight bias shift scale", generator, device=triton_device)
    upstreams = [torch.randn(6, 5, 12, generator=generator).to(triton_device) for _ in range(2)]

    def changed(x):
        if layout == "unaligned":
            return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
        if layout == "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "values apart":
            return x.repeat_interleave(2, dim=-1)[..., ::2]
        return x[:1].expand_as(x)

    inputs, upstreams = {name: changed(x) for name, x in inputs.items()}, [changed(x) for x in upstreams]
    results = [outputs_and_gradients(inputs, upstreams, torch.float32, i) for i in ("triton", "reference")]
    for a, b in zip(*(outs + grads for outs, grads in results), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_several_programs_sum_in_two_stages(triton_device, poisoned, monkeypatch, generator):
    inputs = draw((2, 9, 12), "weight bias shift scale", generator, device=triton_device)
    upstreams = [torch.randn(2, 9, 12, generator=generator).to(triton_device)]
    monkeypatch.setattr(module, "tiles_for", lambda *_: RowTiles(2, 16, 4, 4))
    results = [outputs_and_gradients(inputs, upstreams, torch.float32, i) for i in ("triton", "triton", "reference")]
    first, second, expected = (outs + grads for outs, grads in results)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for a, b in zip(first, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_each_output_and_each_input_by_itself(implementation, triton_device, generator):
    inputs = draw((3, 4, 8), "residual weight bias shift scale", generator, device=triton_device)
    upstream = torch.randn(3, 4, 8, generator=generator).to(triton_device)
    for output in (0, 1):
        leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
        out = call(leaves, implementation=implementation)[output]
        expected = torch.autograd.grad(out, list(leaves.values()), upstream, retain_graph=True, allow_unused=True)
        again = torch.autograd.grad(out, list(leaves.values()), upstream, allow_unused=True)
        for name, wanted, repeated in zip(leaves, expected, again, strict=True):
            assert (wanted is None) == (output == 0 and name not in ("x", "residual"))
            if wanted is not None:
                assert torch.equal(wanted, repeated)
                alone = {key: x.detach().requires_grad_(key == name) for key, x in leaves.items()}
                out_alone = call(alone, implementation=implementation)[output]
                torch.testing.assert_close(torch.autograd.grad(out_alone, alone[name], upstream)[0], wanted)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_stream_of_another_dtype(implementation, triton_device, generator):
    inputs = draw((5, 8), "residual weight", generator, device=triton_device)
    inputs["x"] = inputs["x"].half()
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    total, normed = call(leaves, implementation=implementation)
    assert total.dtype == torch.float32 and normed.dtype == torch.float16
    (total.sum() + normed.float().square().sum()).backward()
    assert [x.grad.dtype for x in leaves.values()] == [x.dtype for x in leaves.values()]
    before = leaves["residual"].grad.clone()
    leaves["x"].grad.zero_()
    assert torch.equal(leaves["residual"].grad, before), "gradients share memory"
    torch.testing.assert_close(total, inputs["x"].float() + inputs["residual"])


def test_gradients_of_x_and_residual_do_not_share_memory(triton_device, generator):
    leaves = {name: x.requires_grad_() for name, x in draw((5, 8), "residual", generator, device=triton_device).items()}
    call(leaves, implementation="triton")[1].square().sum().backward()
    before = leaves["residual"].grad.clone()
    leaves["x"].grad.zero_()
    assert torch.equal(leaves["residual"].grad, before)


def test_registrations(triton_device, generator):
    inputs = draw((2, 3, 8), "residual weight bias shift scale", generator, device=triton_device)
    for quantize in (False, True):
        leaves = [x.detach().clone().requires_grad_() for x in inputs.values()]
        names = ("test_schema", "test_autograd_registration", "test_faketensor")  # the others add up outputs, fp8 too
        torch.library.opcheck(module._operator, (*leaves, 1e-5, quantize), test_utils=names)
    x, scale = inputs["x"], inputs["scale"]
    mean, rstd = x.mean(-1), 1 / x.std(-1)
    for with_sums in (False, True):
        arguments = (x, x * 2, x, None, scale, mean, rstd, with_sums)
        torch.library.opcheck(module._backward_operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("quantize", [False, True], ids=["wide", "fp8"])
def test_compile_and_export(implementation, quantize, triton_device, generator):
    inputs = draw((2, 3, 8), "residual weight bias shift scale", generator, device=triton_device)

    class Norm(torch.nn.Module):
        def forward(self, inputs):
            total, normed = call(inputs, quantize=quantize, implementation=implementation)
            return total, normed.carrier * 2 if quantize else normed

    expected = Norm()(inputs)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    compiled = torch.compile(Norm(), backend="aot_eager", fullgraph=True)(leaves)
    for got, wanted in zip(compiled, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    eager = Norm()(leaves)
    grads = [
        torch.autograd.grad(out[1].square().sum() + out[1].sum(), list(leaves.values())) for out in (compiled, eager)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    exported = torch.export.export(Norm(), (inputs,)).module()(inputs)
    for got, wanted in zip(exported, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(())}, r"rows \(..., C\) with C at least 1, got \(\)"),
        ({"x": torch.zeros(2, 0)}, r"got \(2, 0\)"),
        ({"residual": torch.zeros(2, 4)}, r"residual must have the shape of x \(2, 3, 4\), got \(2, 4\)"),
        ({"weight": torch.zeros(3)}, r"weight must be \(4\) as the rows of x, got \(3,\)"),
        ({"bias": torch.zeros(1, 4)}, r"bias must be \(4\)"),
        ({"shift": None}, "shift and scale come together"),
        ({"shift": torch.zeros(3, 4)}, r"shift must be \(B, C\) for x \(B, ..., C\), got \(3, 4\)"),
        ({"scale": torch.zeros(4)}, r"scale must be \(B, C\)"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.int32)}, r"x is torch.int32; convert"),
        ({"bias": torch.zeros(4, device="meta")}, "x is on cpu but bias on meta; move all to one device"),
        ({"implementation": "native"}, "has no native implementation"),
        (
            {"implementation": "triton", "x": torch.zeros(2, 3, 4).double()},
            r"float32, float16 and bfloat16, got torch.float64",
        ),
        ({"implementation": "triton", "residual": torch.zeros(2, 3, 4).double()}, r"got torch.float64"),
    ],
)
def test_refusals(change, words, triton_device, generator):
    inputs = draw((2, 3, 4), "residual weight bias shift scale", generator) | change
    if "residual" not in change:
        del inputs["residual"]
    with pytest.raises(ValueError, match=words):
        call(inputs)


def test_triton_refuses_long_rows(triton_device):
    with pytest.raises(ValueError, match="layer_norm_modulate in Triton takes rows of up to 16384 values, got 16385"):
        layer_norm_modulate(torch.zeros(1, 16385, device=triton_device), implementation="triton")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_auto_agrees_with_the_definition(case, generator):
    inputs = draw(*case, generator)
    for got, wanted in zip(call(inputs), call(inputs, implementation="reference"), strict=True):
        torch.testing.assert_close(got, wanted)
