"""Attention added to what is there: every implementation and both forms against float64; refusals; tracing."""

import pytest
import torch

from omniid.kernels import add_identity_attention as module
from omniid.kernels._native_library import library
from omniid.kernels.add_identity_attention import (
    FP8,
    IdentityTiles,
    add_identity_attention,
    add_identity_attention_,
    add_identity_attention_reference,
    identity_tiles,
)
from omniid.kernels.dense_attention import dense_attention

needs_native = pytest.mark.skipif(library() is None, reason="the native library is not built")
NATIVE = pytest.param("native", marks=needs_native)


def inputs(batch, queries, keys, heads, size, dtype=torch.float32, device="cpu"):
    """out and q as image rows of a longer sequence, k and v interleaved in memory, a scale for each token."""
    g = torch.Generator().manual_seed(0)
    out, q = (torch.randn(batch, queries + 3, heads, size, generator=g).to(device, dtype)[:, 3:] for _ in range(2))
    k, v = torch.randn(batch, keys, 2, heads, size, generator=g).to(device, dtype).unbind(2)
    return out, q, k, v, torch.rand(batch, queries, generator=g).to(device)


SHAPES = [(1, 1, 1, 1, 32), (2, 37, 19, 2, 80), (1, 129, 257, 1, 128)]


@pytest.mark.parametrize("implementation", ["auto", "reference", NATIVE])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, implementation):
    out, q, k, v, scale = inputs(*shape)
    for s in (0.5, scale, scale[:1]):
        exact = add_identity_attention_reference(*(x.double() for x in (out, q, k, v)), s)
        torch.testing.assert_close(
            add_identity_attention(out, q, k, v, s, implementation=implementation).double(), exact, atol=1e-5, rtol=1e-5
        )
        place = out.clone()
        assert add_identity_attention_(place, q, k, v, s, implementation=implementation) is place
        torch.testing.assert_close(place.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["auto", "reference", "triton", NATIVE])
def test_one_identity_serves_all_pictures(implementation, triton_device):
    out, q, k, v, _ = inputs(3, 5, 7, 1, 32, device=triton_device if implementation == "triton" else "cpu")
    one = [x[:1].detach().clone().requires_grad_() for x in (k, v)]
    shared, each = (
        add_identity_attention(out, q, *pair, 0.7, implementation=implementation)
        for pair in (one, [x.expand_as(k) for x in one])
    )
    assert torch.equal(shared, each)
    for a, b in zip(*(torch.autograd.grad(x.sum(), one) for x in (shared, each)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        place = add_identity_attention_(out, q, *one, 0.7, implementation=implementation)
    torch.testing.assert_close(place, each.detach(), atol=1e-5, rtol=1e-5)


def test_several_identities_are_several_calls():
    out, q, k, v, _ = inputs(1, 5, 7, 2, 32)
    both = add_identity_attention_(add_identity_attention_(out.clone(), q, k, v, 0.3), q, v, k, 0.7)
    apart = add_identity_attention(out, q, k, v, 0.3) - out + add_identity_attention(out, q, v, k, 0.7)
    torch.testing.assert_close(both, apart, atol=1e-5, rtol=1e-5)


def torchs(out, q, k, v, scale):
    """What PyTorch alone makes of it, in the inputs' dtype."""
    return (out + scale.to(q.dtype)[..., None, None] * dense_attention(q, k, v)).to(out.dtype)


def check(implementation, shape, dtype, device, assert_accurate):
    out, q, k, v, scale = inputs(*shape, dtype, device)
    exact = add_identity_attention_reference(*(x.double() for x in (out, q, k, v)), scale.double())
    before = [x.clone() for x in (q, k, v, scale)]
    rows = torch.full((shape[0], shape[1] + 3, *out.shape[2:]), float("nan"), dtype=dtype, device=device)
    place = rows[:, 3:].copy_(out)
    add_identity_attention_(place, q, k, v, scale, implementation=implementation)
    assert rows[:, :3].isnan().all(), "wrote outside of out"
    assert_accurate("out", place, torchs(out, q, k, v, scale), exact)
    for x, old in zip((q, k, v, scale), before, strict=True):
        assert torch.equal(x, old), "an input changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_is_as_accurate_as_torch(shape, dtype, triton_device, poisoned, assert_accurate):
    check("triton", shape, dtype, triton_device, assert_accurate)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 64, 32, 3, 64), (1, 17, 13, 5, 37), (2, 16, 129, 1, 1)], ids=str)
def test_native_is_as_accurate_as_torch(shape, dtype, poisoned, assert_accurate):
    check("native", shape, dtype, "cpu", assert_accurate)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 4096, 256, 24, 128), (1, 1000, 600, 24, 128), (4, 64, 32, 3, 64)], ids=str)
def test_triton_in_bfloat16(shape, triton_device, poisoned, assert_accurate):
    check("triton", shape, torch.bfloat16, triton_device, assert_accurate)


@pytest.mark.parametrize("size", [80, 64], ids=["in two parts", "in one"])
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "through L2"])
def test_triton_at_several_tiles_a_program(resident, size, triton_device):
    from omniid.kernels.triton.add_identity_attention import add_in_place

    out, q, k, v, _ = inputs(1, 37, 19, 1, size, device=triton_device)
    exact = add_identity_attention_reference(*(x.double() for x in (out, q, k, v)), 0.5)
    add_in_place(out, q, k, v, None, 0.5, None, None, IdentityTiles(16, 32 if resident else 16, 2, resident, 4, 1))
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["auto", "reference", "triton", NATIVE])
def test_fp8_keys_and_values(implementation, request):
    device = request.getfixturevalue("triton_device") if implementation == "triton" else "cpu"
    out, q, k, v, scale = inputs(1, 9, 19, 2, 32, device=device)
    k_scale, v_scale = torch.rand(2, 2, device=device) + 0.5
    k, v = (x.to("cpu").to(FP8).to(device) for x in (k, v))
    wide = (k.double() * k_scale[:, None], v.double() * v_scale[:, None])
    exact = add_identity_attention_reference(out.double(), q.double(), *wide, scale.double())
    add_identity_attention_(out, q, k, v, scale, k_scale=k_scale, v_scale=v_scale, implementation=implementation)
    torch.testing.assert_close(out.double(), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_fp8_costs_what_its_rounding_costs(triton_device):
    out, q, k, v, _ = inputs(1, 1000, 256, 24, 128, torch.bfloat16, triton_device)
    exact = add_identity_attention_reference(*(x.double() for x in (torch.zeros_like(out), q, k, v)))
    scales = [x.float().abs().amax((0, 1, 3)) / 448 for x in (k, v)]
    k, v = ((x.float() / s[:, None]).to(FP8) for x, s in zip((k, v), scales, strict=True))
    out.zero_()
    add_identity_attention_(out, q, k, v, k_scale=scales[0], v_scale=scales[1], implementation="triton")
    assert (out.double() - exact).norm() < 5e-2 * exact.norm()


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_gradients(implementation):
    out, q, k, v, scale = (x[..., :3] if x.dim() == 4 else x for x in inputs(2, 4, 3, 2, 32, torch.float64))
    leaves = [x.detach().double().clone().requires_grad_() for x in (out, q, k, v, scale)]
    assert torch.autograd.gradcheck(lambda *x: add_identity_attention(*x, implementation=implementation), leaves)


def check_gradients(implementation, shape, dtype, device, assert_accurate):
    tensors = [x.to(dtype) for x in inputs(*shape, dtype, device)]
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    before = [x.clone() for x in (*tensors, grad)]

    def run(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        out = function(*leaves)
        first = torch.autograd.grad(out, leaves, grad.to(dtype), retain_graph=True)
        return out, *first, *torch.autograd.grad(out, leaves, grad.to(dtype))

    def attend(*x):
        return add_identity_attention(*x, implementation=implementation)

    results = run(attend, dtype), run(torchs, dtype), run(torchs, torch.float64)
    for name, *three in zip(("sum", "out", "q", "k", "v", "scale"), *results, strict=False):
        assert_accurate(name, *three)
    for first, second in zip(results[0][1:6], results[0][6:], strict=True):
        assert torch.equal(first, second), "a second backward differs"
    for x, old in zip((*tensors, grad), before, strict=True):
        assert torch.equal(x, old), "an input changed"
    with torch.no_grad():
        assert_accurate("without gradients", attend(*tensors), results[1][0], results[2][0])


def test_triton_gradients_are_as_accurate_as_torchs(triton_device, poisoned, assert_accurate):
    check_gradients("triton", (2, 37, 19, 1, 80), torch.float32, triton_device, assert_accurate)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(2, 37, 19, 1, 80), (3, 64, 32, 3, 64), (1, 1, 129, 2, 17)], ids=str)
def test_native_gradients_are_as_accurate_as_torchs(shape, dtype, poisoned, assert_accurate):
    check_gradients("native", shape, dtype, "cpu", assert_accurate)


@needs_native
def test_the_number_of_threads_changes_nothing():
    out, q, k, v, scale = inputs(2, 150, 70, 3, 40, torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(add_identity_attention_(out.clone(), q, k, v, scale, implementation="native"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_native
def test_autograd_notices_that_out_changed():
    out, q, k, v, _ = inputs(1, 5, 7, 2, 32)
    out = out.clone().requires_grad_()
    square = out.square().sum()
    with torch.no_grad():
        add_identity_attention_(out, q, k, v, implementation="native")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()
    with torch.inference_mode():
        assert add_identity_attention_(out.clone(), q, k, v, implementation="native").isfinite().all()


def test_no_pictures_and_no_tokens(triton_device):
    for shape in ((0, 5, 7, 2, 32), (1, 0, 7, 2, 32)):
        out, q, k, v, scale = inputs(*shape, device=triton_device)
        for implementation in ("auto", "reference", "triton", *(["native"] if library() else [])):
            assert add_identity_attention_(out, q, k, v, scale, implementation=implementation).shape == q.shape


def test_zero_values_change_nothing_to_the_bit():
    out, q, k, v, _ = inputs(1, 5, 7, 2, 32)
    assert torch.equal(add_identity_attention(out, q, k, v * 0, 0.7), out)


@pytest.mark.parametrize("implementation", [None, "triton", NATIVE])
def test_can_be_compiled(implementation, triton_device):
    *tensors, scale = inputs(1, 5, 7, 1, 32, device=triton_device)

    def run(out, q, k, v, scale):
        return add_identity_attention_(out * 1, q, k, v, scale, implementation=implementation)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors, scale)
    torch.testing.assert_close(compiled, add_identity_attention_reference(*tensors, scale), atol=1e-5, rtol=1e-5)


@needs_native
def test_native_can_be_exported_and_trained_compiled():
    tensors = [x.detach().clone().requires_grad_() for x in inputs(2, 5, 7, 1, 32)]

    class Model(torch.nn.Module):
        def forward(self, *x):
            return add_identity_attention(*x, implementation="native")

    expected = add_identity_attention_reference(*tensors)
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), tensors) for x in (compiled, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    plain = tuple(x.detach() for x in tensors)
    with torch.no_grad():
        program = torch.export.export(Model(), plain)
    torch.testing.assert_close(program.module()(*plain), expected.detach(), atol=1e-5, rtol=1e-5)
    torch.library.opcheck(module._operator, (*plain, 0.0, None, None, "native"), test_utils="test_faketensor")


def test_wrong_inputs_are_refused(triton_device):
    out, q, k, v, scale = inputs(2, 5, 7, 2, 32)
    ones = torch.ones(2)
    for arguments, options, words in (
        ((out[:, 1:], q, k, v), {}, r"out and q must both be \(B, Lq, H, D\)"),
        ((out, q, k[..., 1:, :], v[..., 1:, :]), {}, "at least one token and the B, H and D of q"),
        ((out, q, k[:, :0], v[:, :0]), {}, "at least one token"),
        ((out, q, k, v[:, 1:]), {}, r"v_id \(2, 6, 2, 32\)"),
        ((out, q, k, v, scale[:, 1:]), {}, r"scale must be a number, \(B, Lq\) or \(1, Lq\) for Lq = 5"),
        ((out, q, k.to("meta"), v), {}, "must be on one device"),
        ((out, q, k.half(), v), {}, "must have the dtype of q torch.float32, got torch.float16"),
        ((out, q, k.to(FP8), v.to(FP8)), {}, "come together, with k_scale and v_scale"),
        ((out, q, k, v), {"k_scale": ones, "v_scale": ones}, "others take neither"),
        (
            (out, q, k.to(FP8), v.to(FP8)),
            {"k_scale": ones[:1], "v_scale": ones},
            "k_scale must hold one value for each",
        ),
        ((out.clone().requires_grad_(), q, k, v), {}, "use add_identity_attention, or torch.no_grad"),
        ((out, q, k, v, scale.clone().requires_grad_()), {}, "has no gradient"),
        ((out[:1, :1].expand_as(out), q, k, v), {}, "one value in several places"),
    ):
        with pytest.raises(ValueError, match=words):
            add_identity_attention_(*arguments, **options)
    turned = out.transpose(2, 3).contiguous().transpose(2, 3).to(triton_device)
    with pytest.raises(ValueError, match="channels side by side"):
        add_identity_attention_(turned, *(x.to(triton_device) for x in (q, k, v)), implementation="triton")


@needs_native
def test_native_refuses_what_it_cannot_do():
    out, q, k, v, scale = inputs(2, 5, 7, 2, 32)
    turned = out.transpose(2, 3).contiguous().transpose(2, 3)
    for arguments, words in (
        (
            (out.double(), q.double(), k.double(), v.double()),
            "runs natively in float32 and bfloat16, got torch.float64",
        ),
        ((out.bfloat16(), q, k, v), "natively in one dtype, got torch.bfloat16 and torch.float32; convert one"),
        ((turned, q, k, v), "natively needs out with its channels side by side"),
    ):
        with pytest.raises(ValueError, match=words):
            add_identity_attention_(*arguments, scale, implementation="native")
        place = arguments[0].clone()
        assert add_identity_attention_(place, *arguments[1:], scale) is place, "auto takes another implementation"
    differentiated = [x.double().requires_grad_() for x in (out, q, k, v)]
    with pytest.raises(ValueError, match="runs natively in float32 and bfloat16"):
        add_identity_attention(*differentiated, implementation="native")


@needs_native
def test_auto_leaves_to_torch_what_native_does_not_take(monkeypatch):
    """At a size where it prefers the native form: keys of another dtype than out, and channels that lie apart."""
    monkeypatch.setattr("omniid.kernels.varlen_cross_attention._cpu_capability", lambda: "AVX2")
    out, q, k, v, scale = inputs(4, 64, 32, 3, 64)
    exact = add_identity_attention_reference(*(x.double() for x in (out, q, k, v, scale)))
    for place in (out.double(), out.transpose(2, 3).contiguous().transpose(2, 3)):
        for sum_ in (add_identity_attention(place, q, k, v, scale), add_identity_attention_(place, q, k, v, scale)):
            torch.testing.assert_close(sum_.double(), exact, atol=1e-5, rtol=1e-5)


def test_tiles_follow_from_sizes():
    sizes = {"batch": 1, "num_queries": 4096, "num_keys": 256, "num_heads": 24, "head_dim": 128, "element_size": 2}
    assert identity_tiles(**sizes, capability=(9, 0)) == IdentityTiles(64, 64, 1, False, 4, 2)
    # 5 programs for each of 24 heads, of 7 tiles each: 120 of 132 multiprocessors in one wave.
    assert identity_tiles(**sizes | {"head_dim": 64}, capability=(9, 0)) == IdentityTiles(128, 256, 7, True, 8, 1)
    assert identity_tiles(**sizes | {"num_keys": 16, "num_queries": 64}, capability=(9, 0)).num_warps == 4
    assert identity_tiles(**sizes | {"num_keys": 128}, capability=(9, 0)).resident
    assert not identity_tiles(**sizes | {"num_keys": 128}, capability=(12, 0)).resident  # it would spill there
    assert not identity_tiles(**sizes | {"num_keys": 300, "head_dim": 32}, capability=(9, 0)).resident
    assert identity_tiles(**sizes | {"element_size": 4}, capability=(9, 0)) == IdentityTiles(32, 32, 1, False, 4, 1)
    assert identity_tiles(**sizes, capability=None) == IdentityTiles(128, 256, 1, True, 4, 1)
    assert not identity_tiles(**sizes | {"num_keys": 600}, capability=None).resident
