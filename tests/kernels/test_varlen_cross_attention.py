"""Packed cross-attention: every implementation against one sequence at a time in float64; refusals; tracing."""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omniid.kernels import varlen_cross_attention as module
from omniid.kernels._native_library import library
from omniid.kernels.varlen_cross_attention import (
    Tiles,
    backward_tiles,
    forward_tiles,
    native_is_faster,
    varlen_cross_attention,
    varlen_cross_attention_reference,
)

needs_native = pytest.mark.skipif(library() is None, reason="the native library is not built")
NATIVE = pytest.param("native", marks=needs_native)


def one_by_one(q, k, v, cu, cu_q=None):
    out = []
    for b, (start, end) in enumerate(pairwise(cu.tolist())):
        queries = q[cu_q[b] : cu_q[b + 1]] if cu_q is not None else q if q.dim() == 3 else q[b]
        scores = torch.einsum("lhd,shd->hls", queries.double(), k[start:end].double()) * q.shape[-1] ** -0.5
        out.append(torch.einsum("hls,shd->lhd", scores.softmax(-1), v[start:end].double()))
    return torch.stack(out) if cu_q is None else torch.cat(out)


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(kind, lengths, queries, heads, size, dtype=torch.float32, device="cpu", seed=0):
    """q, k, v, bounds of keys and of queries; k and v interleaved in memory, q one element off every alignment."""
    g = torch.Generator().manual_seed(seed)
    cu, cu_q = bounds(lengths), None
    if kind == "packed":
        cu_q = bounds(queries)
        shape = (sum(queries), heads, size)
    else:
        shape = (queries, heads, size) if kind == "shared" else (len(lengths), queries, heads, size)
    numel = torch.Size(shape).numel()
    q = torch.randn(numel + 1, generator=g).to(device, dtype)[1:].view(shape)
    k, v = torch.randn(sum(lengths), 2, heads, size, generator=g).to(device, dtype).unbind(1)
    return q, k, v, cu, cu_q


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    kind=st.sampled_from(["shared", "batched", "packed"]),
    implementation=st.sampled_from(["auto", "reference", *(["native"] if library() else [])]),
    heads=st.sampled_from([1, 3]),
    size=st.sampled_from([32, 80, 128]),
    seed=st.integers(0, 1000),
)
def test_matches_one_sequence_at_a_time(lengths, kind, implementation, heads, size, seed):
    queries = [1 + (seed + n) % 3 for n in lengths] if kind == "packed" else 7
    q, k, v, cu, cu_q = inputs(kind, lengths, queries, heads, size, seed=seed)
    out = varlen_cross_attention(q, k, v, cu, cu_seqlens_q=cu_q, implementation=implementation)
    torch.testing.assert_close(out.double(), one_by_one(q, k, v, cu, cu_q), atol=1e-5, rtol=1e-5)


CASES = [
    ("shared", [1, 257, 7], 37, 2, 80, torch.float32),
    ("shared", [127], 1, 1, 128, torch.float16),
    ("batched", [13, 1], 129, 1, 64, torch.float16),
    ("packed", [31, 5], [1, 130], 1, 37, torch.float32),
]


def check(implementation, case, device, assert_accurate):
    kind, lengths, queries, heads, size, dtype = case
    q, k, v, cu, cu_q = inputs(kind, lengths, queries, heads, size, dtype, device)
    grad = torch.randn(one_by_one(q, k, v, cu, cu_q).shape, generator=torch.Generator().manual_seed(1)).to(q)
    before = [x.clone() for x in (q, k, v, grad)]

    def run(attend, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        first = torch.autograd.grad(out, leaves, grad.to(dtype), retain_graph=True)
        return out, *first, *torch.autograd.grad(out, leaves, grad.to(dtype))

    def attend(q, k, v):
        return varlen_cross_attention(q, k, v, cu, cu_seqlens_q=cu_q, implementation=implementation)

    def torchs(q, k, v):
        return module.grouped_attention(q, k, v, cu, cu_q, q.shape[-1] ** -0.5)

    actual, own, exact = run(attend, dtype), run(torchs, dtype), run(torchs, torch.float64)
    for name, *three in zip(("out", "dq", "dk", "dv"), actual, own, exact, strict=False):
        assert_accurate(name, *three)
    for first, second in zip(actual[1:4], actual[4:], strict=True):
        assert torch.equal(first, second), "a second backward differs"
    for x, old in zip((q, k, v, grad), before, strict=True):
        assert torch.equal(x, old), "an input changed"
    with torch.no_grad():
        assert torch.equal(attend(q, k, v), actual[0]), "without gradients the result differs"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-d{case[4]}-{str(case[5])[6:]}")
def test_triton_is_as_accurate_as_torch(case, triton_device, poisoned, assert_accurate):
    check("triton", case, triton_device, assert_accurate)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "case",
    [
        ("shared", [1, 257, 7], 37, 2, 80),
        ("shared", [65, 130, 195], 32, 3, 64),
        ("batched", [127, 129, 1], 1, 1, 128),
        ("batched", [13, 1], 129, 1, 1),
        ("packed", [31, 5, 300], [1, 130, 17], 2, 37),
        ("packed", [2], [16], 1, 257),
    ],
    ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}-d{case[4]}",
)
def test_native_is_as_accurate_as_torch(case, dtype, poisoned, assert_accurate):
    check("native", (*case, dtype), "cpu", assert_accurate)


@needs_native
def test_native_strides(assert_accurate):
    """Channels apart and one value for all rows come back as contiguous inputs do."""
    q, k, v, cu, _ = inputs("batched", [5, 70], 3, 2, 33)
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for x in (q, k, v)]
    plain = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    results = []
    for leaves in (turned, plain):
        out = varlen_cross_attention(*leaves, cu, implementation="native")
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))  # the gradient is one value, expanded
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["shared", "batched", "packed"])
def test_the_number_of_threads_changes_nothing(kind, dtype):
    q, k, v, cu, cu_q = inputs(kind, [3, 140, 30, 7], [50, 20, 2, 33] if kind == "packed" else 50, 3, 40, dtype)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            out = varlen_cross_attention(*leaves, cu, cu_seqlens_q=cu_q, implementation="native")
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_native_keeps_nan_in_its_sequence():
    q, k, v, cu, _ = inputs("shared", [3, 20, 4], 5, 1, 32)
    k = k.clone()
    k[10, 0, 7] = torch.nan
    out = varlen_cross_attention(q, k, v, cu, implementation="native")
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@needs_native
@pytest.mark.parametrize("size", [1e3, 1e-3, 1e18])
def test_native_survives_large_and_small_scores(size):
    q, k, v, cu, _ = inputs("shared", [150, 3], 5, 2, 32)
    out = varlen_cross_attention(q * size, k, v, cu, implementation="native")
    torch.testing.assert_close(out.double(), one_by_one(q * size, k, v, cu), atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("kind", ["shared", "batched", "packed"])
def test_triton_in_bfloat16(kind, size, triton_device, poisoned, assert_accurate):
    queries = [256, 1, 100] if kind == "packed" else 256
    case = (kind, [257, 771, 2056], queries, 16, size, torch.bfloat16)
    check("triton", case, triton_device, assert_accurate)


@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=3), kind=st.sampled_from(["shared", "packed"]))
def test_triton_at_any_bounds(triton_device, lengths, kind):
    queries = [1 + 2 * n for n in lengths] if kind == "packed" else 5
    q, k, v, cu, cu_q = inputs(kind, lengths, queries, 1, 48, device=triton_device)
    out = varlen_cross_attention(q, k, v, cu, cu_seqlens_q=cu_q, implementation="triton")
    torch.testing.assert_close(out.double(), one_by_one(q, k, v, cu, cu_q), atol=1e-5, rtol=1e-5)


def test_triton_merges_splits_of_the_keys(triton_device, poisoned):
    """The short sequence leaves two of three splits without a key."""
    from omniid.kernels.triton.varlen_cross_attention import forward

    q, k, v, cu, _ = inputs("shared", [3, 50], 5, 2, 80, device=triton_device)
    whole, split = (forward(q, k, v, cu, None, 0.1, Tiles(16, 16, 4, 1, n)) for n in (1, 3))
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["shared", "batched", "packed"])
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_gradients(kind, implementation):
    q, k, v, cu, cu_q = inputs(kind, [3, 1, 3], [2, 1, 3] if kind == "packed" else 4, 2, 4, torch.float64)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]

    def run(*x):
        return varlen_cross_attention(*x, cu, cu_seqlens_q=cu_q, implementation=implementation)

    assert torch.autograd.gradcheck(run, leaves)


def test_gradients_of_the_definition():
    q, k, v, cu, _ = inputs("shared", [3, 1], 4, 2, 4, torch.float64)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: varlen_cross_attention_reference(*x, cu, scale=0.7), leaves)


@pytest.mark.parametrize("implementation", ["auto", "reference", "triton", NATIVE])
def test_no_sequences(implementation, request):
    device = request.getfixturevalue("triton_device") if implementation == "triton" else "cpu"
    q = torch.rand(4, 2, 32, device=device, requires_grad=True)
    empty = torch.empty(0, 2, 32, device=device)
    out = varlen_cross_attention(q, empty, empty, torch.tensor([0]), implementation=implementation)
    assert out.shape == (0, 4, 2, 32)
    packed = varlen_cross_attention(
        empty, empty, empty, torch.tensor([0]), cu_seqlens_q=torch.tensor([0]), implementation=implementation
    )
    assert packed.shape == (0, 2, 32)
    if implementation != "auto":
        assert not torch.autograd.grad(out.sum(), q)[0].any()


@pytest.mark.parametrize("implementation", ["auto", "reference", NATIVE])
def test_can_be_compiled_and_exported(implementation, monkeypatch):
    monkeypatch.setenv("OMNIID_KERNELS", implementation)
    q, k, v, cu, _ = inputs("shared", [3, 5], 4, 2, 32)
    q = q.detach().requires_grad_()

    class Model(torch.nn.Module):
        def forward(self, q, k, v, cu):
            return varlen_cross_attention(q, k, v, cu) * 2

    expected = 2 * one_by_one(q, k, v, cu).float()
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")(q, k, v, cu)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(x.sum(), q, retain_graph=True)[0] for x in (compiled, expected)), atol=1e-6, rtol=1e-5
    )
    program = torch.export.export(Model(), (q, k, v, cu))
    torch.testing.assert_close(program.module()(q, k, v, cu), expected)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    name = "reference" if implementation == "auto" else implementation
    torch.library.opcheck(module._operator, (q, k, v, cu, None, 0.2, name), test_utils=tests)
    with torch.no_grad():
        results = module._operator(q, k, v, cu, None, 0.2, name)
    torch.library.opcheck(
        module._backward_operator, (expected, q, k, v, *results, cu, None, 0.2, name), test_utils=tests[:2]
    )


@pytest.mark.parametrize(
    ("cu", "message"),
    [
        ([0, 3], "must increase from 0 to the number of keys 5"),
        ([0, 2, 2, 5], "must increase"),
        ([1, 5], "must increase"),
    ],
)
@pytest.mark.parametrize("implementation", ["auto", "reference", NATIVE])
def test_bad_bounds(cu, message, implementation):
    k = torch.rand(5, 2, 32)
    with pytest.raises(ValueError, match=message):
        varlen_cross_attention(torch.rand(4, 2, 32), k, k, torch.tensor(cu), implementation=implementation)


def test_bad_shapes():
    k = torch.rand(5, 2, 32)
    cu, cu_q = torch.tensor([0, 5]), torch.tensor([0, 3])
    for arguments, words in (
        ((torch.rand(4, 3, 32), k, k, cu), "same H and D"),
        ((torch.rand(2, 4, 2, 32), k, k, cu), "q holds 2 sequences"),
        ((k, k, k.half(), cu), "one floating dtype, got torch.float32, torch.float32 and torch.float16"),
        ((k, k.to("meta"), k.to("meta"), cu), "must be on one device"),
        ((k, k, k, cu.float()), r"cu_seqlens_k must be \(B \+ 1\) integers"),
        ((k, k, k, cu[:0]), r"cu_seqlens_k must be \(B \+ 1\) integers"),
        ((k, k, k, cu, cu_q), "cu_seqlens_q must increase from 0 to the number of queries 5"),
        ((k[None], k, k, cu, cu_q), "goes with packed q"),
        ((k, k, k, cu, torch.tensor([0, 2, 5])), "cu_seqlens_q holds 2 sequences but cu_seqlens_k 1"),
    ):
        *four, packed = arguments if len(arguments) == 5 else (*arguments, None)
        with pytest.raises(ValueError, match=words):
            varlen_cross_attention(*four, cu_seqlens_q=packed)


def test_triton_refuses_what_it_cannot_do(triton_device, monkeypatch):
    def run(dtype=torch.float32, size=32):
        x = torch.rand(5, 2, size, device=triton_device, dtype=dtype)
        varlen_cross_attention(x, x, x, torch.tensor([0, 2, 5]), implementation="triton")

    with pytest.raises(ValueError, match=r"takes float32, float16 and bfloat16, got torch\.float64; convert or use"):
        run(torch.float64)
    with pytest.raises(ValueError, match="head sizes 32 to 128, got 16"):
        run(size=16)
    if triton_device == "cpu":
        with pytest.raises(ValueError, match="interpreter multiplies bfloat16 wrongly"):
            run(torch.bfloat16)
    monkeypatch.setattr(module, "MAX_SEQUENCES", 1)
    with pytest.raises(ValueError, match="up to 1 sequences, got 2; split the batch"):
        run()


@needs_native
def test_native_refuses_what_it_cannot_do(monkeypatch):
    x, cu = torch.rand(5, 2, 32), torch.tensor([0, 2, 5])
    for dtype in (torch.float64, torch.float16):
        y = x.to(dtype)
        with pytest.raises(ValueError, match=f"runs natively in float32 and bfloat16, got {dtype}; convert or use"):
            varlen_cross_attention(y, y, y, cu, implementation="native")
        assert varlen_cross_attention(y, y, y, cu).dtype == dtype
    with pytest.raises(ValueError, match="the inputs are on meta; move them to the CPU"):
        varlen_cross_attention(x.to("meta"), x.to("meta"), x.to("meta"), cu, implementation="native")
    monkeypatch.setattr("omniid.kernels._native_library.library", lambda: None)
    with pytest.raises(RuntimeError, match="varlen_cross_attention cannot run so: the native library is not built"):
        varlen_cross_attention(x, x, x, cu, implementation="native")
    torch.testing.assert_close(varlen_cross_attention(x, x, x, cu).double(), one_by_one(x, x, x, cu))


def test_where_native_is_faster():
    mini = {"dtype": torch.float32, "num_queries": 32, "multiply_adds": 6 << 20, "training": False}
    assert native_is_faster(**mini, capability="AVX2")
    assert native_is_faster(**mini | {"dtype": torch.bfloat16}, capability="AVX2")
    assert not native_is_faster(**mini | {"dtype": torch.float16}, capability="AVX2")
    assert not native_is_faster(**mini | {"num_queries": 16}, capability="AVX2")
    assert not native_is_faster(**mini, capability="AVX512")
    small = mini | {"multiply_adds": 400_000}
    assert native_is_faster(**small, capability="AVX2")
    assert not native_is_faster(**small | {"multiply_adds": 200_000}, capability="AVX2")
    assert not native_is_faster(**small | {"training": True}, capability="AVX2")
    assert native_is_faster(**small | {"training": True, "dtype": torch.bfloat16}, capability="AVX2")


def test_tiles_follow_from_sizes():
    sizes = {"num_queries": 256, "num_keys": 771, "num_heads": 16, "head_dim": 80, "element_size": 2}
    hopper = {"capability": (9, 0), "num_sms": 132}
    assert forward_tiles(**sizes, num_sequences=32, **hopper) == Tiles(128, 64, 8, 2, 1)
    assert forward_tiles(**sizes, num_sequences=1, **hopper).num_splits == 4
    assert forward_tiles(**sizes | {"num_keys": 60}, num_sequences=1, **hopper).num_splits == 1
    assert forward_tiles(**sizes | {"num_queries": 64}, num_sequences=32, **hopper).block_q == 64
    assert forward_tiles(**sizes | {"element_size": 4}, num_sequences=32, **hopper).block_k == 32
    assert forward_tiles(**sizes, num_sequences=1, capability=None) == Tiles(128, 128, 4, 1, 1)
    blackwell = forward_tiles(**sizes, num_sequences=32, capability=(10, 0))
    assert blackwell == Tiles(128, 128, 8, 2, 1), "64 keys of a head in two parts would spill there"
    assert forward_tiles(**sizes | {"head_dim": 64}, num_sequences=32, capability=(10, 0)).block_k == 64
    assert backward_tiles(head_dim=80, element_size=2, capability=(8, 0))[1] == Tiles(32, 64, 8, 2)
    assert backward_tiles(head_dim=64, element_size=2, capability=(9, 0))[0].num_warps == 4
    assert backward_tiles(head_dim=80, element_size=2, capability=(9, 0))[1].num_warps == 8
    assert backward_tiles(head_dim=80, element_size=4, capability=(9, 0))[1] == Tiles(32, 32, 4, 1)
