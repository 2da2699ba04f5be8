"""Row movements of the masked decoder: native and Triton forms against the definition and float64, gradients, refusals."""

from collections.abc import Callable

import pytest
import torch

from omniid.kernels import masked_rows
from omniid.kernels._native_library import library
from omniid.kernels.masked_rows import (
    MovementTiles,
    movement_tiles,
    pick_rows,
    pick_rows_reference,
    place_rows,
    spread_rows,
    spread_rows_reference,
)

# identities, targets, patches, visible, inner shape
SHAPES = [
    (1, 1, 1, 1, (1,)),
    (2, 3, 5, 2, ()),
    (3, 4, 31, 2, (7,)),
    (2, 8, 17, 1, (3, 16)),
    (1, 2, 257, 13, (1, 65)),
    (1, 1, 256, 2, (3,)),  # the visible rows fall into a block of their own
    (2, 5, 7, 0, (2, 3, 5)),
    (0, 4, 8, 2, (6,)),
    (2, 1, 3, 3, (129,)),
]


@pytest.fixture
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The implementation that runs: of `request.param`, or in turn all of them."""
    if request.param == "native" and library() is None:
        pytest.skip("the native library is not built")
    if request.param == "triton" and request.getfixturevalue("triton_device") == "cuda":
        pytest.skip("tensors on the CPU need Triton's interpreter; test_triton_on_a_gpu runs on the GPU")
    monkeypatch.setenv("OMNIID_KERNELS", request.param)
    return request.param


def implementations(*names):
    return pytest.mark.parametrize("implementation", names, indirect=True)


EACH, FAST = implementations("native", "triton", "reference"), implementations("native", "triton")


def draw(shape, generator, dtype=torch.float32):
    """Rows (B, N + T V, ...), visible (B, T, V) and the arguments that follow."""
    identities, targets, patches, visible, inner = shape
    rows = torch.randn(identities, patches + targets * visible, *inner, generator=generator).to(dtype)
    noise = torch.rand(identities, targets, patches, generator=generator)
    return rows, noise.argsort(-1)[..., :visible].contiguous(), targets, patches


def gradient(function: Callable, rows, *rest, upstream):
    rows = rows.detach().requires_grad_()
    return torch.autograd.grad(function(rows, *rest), rows, upstream)[0]


@EACH
def test_spread_rows_places_every_row(implementation, generator):
    rows = torch.rand(2, 5 + 3 * 2, 4, generator=generator)
    visible = torch.tensor([[[0, 4], [1, 2], [2, 3]], [[3, 4], [0, 1], [0, 4]]])
    full = spread_rows(rows, visible, num_targets=3, num_patches=5).view(2, 3, 5, 4)
    for b in range(2):
        for t in range(3):
            for n in range(5):
                shown = (visible[b, t] == n).nonzero()
                expected = rows[b, 5 + t * 2 + int(shown)] if len(shown) else rows[b, n]
                assert torch.equal(full[b, t, n], expected)


# bf16 in Triton on a GPU only: its interpreter cuts bf16 instead of rounding it
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("native", torch.float32), ("native", torch.bfloat16), ("triton", torch.float32), ("triton", torch.float16)],
    ids=["native-fp32", "native-bf16", "triton-fp32", "triton-fp16"],
    indirect=["implementation"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spread_rows_against_float64(implementation, shape, dtype, generator):
    rows, *rest = draw(shape, generator, dtype)
    upstream = torch.randn(spread_rows_reference(rows, *rest).shape, generator=generator).to(dtype)
    kept = rows.clone(), upstream.clone()
    assert torch.equal(spread_rows(rows, *rest), spread_rows_reference(rows, *rest))
    exact = gradient(spread_rows_reference, rows.double(), *rest, upstream=upstream.double())
    got = gradient(spread_rows, rows, *rest, upstream=upstream)
    plain = gradient(spread_rows_reference, rows, *rest, upstream=upstream)
    assert got.dtype == dtype
    error, plain_error = ((x.double() - exact).norm() for x in (got, plain))
    allowed = 1.2 * plain_error + torch.finfo(torch.float32).eps * exact.norm()
    assert error <= allowed, f"error {error:.3g}, torch {plain_error:.3g}, allowed {allowed:.3g}"
    assert torch.equal(rows, kept[0])
    assert torch.equal(upstream, kept[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool], ids=str)
@pytest.mark.parametrize("inner", [(), (1,), (3, 5), (257,)], ids=str)
@FAST
def test_pick_rows_against_the_definition(implementation, inner, dtype, generator):
    rows = torch.randn(3, 11, *inner, generator=generator).to(dtype)
    index = torch.rand(3, 11, generator=generator).argsort(-1)[:, :4]  # not contiguous
    picked = pick_rows(rows, index)
    assert torch.equal(picked, pick_rows_reference(rows, index))
    if dtype.is_floating_point:
        upstream = torch.randn(picked.shape, generator=generator).to(dtype)
        expected = gradient(pick_rows_reference, rows, index, upstream=upstream)
        assert torch.equal(gradient(pick_rows, rows, index, upstream=upstream), expected)


@EACH
def test_empty_picks(implementation):
    assert pick_rows(torch.rand(0, 4, 2), torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, 2)
    assert pick_rows(torch.rand(2, 4, 2), torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 2)


@pytest.mark.parametrize("layout", ["unaligned", "transposed", "heads first", "values apart", "repeated"])
@FAST
def test_spread_rows_of_any_layout(implementation, layout, generator):
    rows, *rest = draw((2, 3, 6, 2, (3, 8)), generator)
    upstream = torch.randn(6, 6, 3, 8, generator=generator)
    if layout == "unaligned":
        rows, upstream = (torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in (rows, upstream))
    elif layout == "transposed":
        rows, upstream = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (rows, upstream))
    elif layout == "heads first":
        rows, upstream = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (rows, upstream))
    elif layout == "values apart":
        rows, upstream = (x.repeat_interleave(2, dim=-1)[..., ::2] for x in (rows, upstream))
    else:
        rows, upstream = rows[:, :1, :1, :1].expand_as(rows), upstream[:1, :1, :1, :1].expand_as(upstream)
    assert torch.equal(spread_rows(rows, *rest), spread_rows_reference(rows.contiguous(), *rest))
    expected = gradient(spread_rows_reference, rows.contiguous(), *rest, upstream=upstream.contiguous())
    torch.testing.assert_close(gradient(spread_rows, rows, *rest, upstream=upstream), expected)
    flat, picks = rows.flatten(2), torch.tensor([[5, 0, 3], [1, 2, 0]])
    assert torch.equal(pick_rows(flat, picks), pick_rows_reference(flat, picks))


@FAST
def test_every_value_is_written(implementation, poisoned, generator):
    rows, *rest = draw((2, 3, 6, 2, (3, 8)), generator)
    spread = spread_rows(rows, *rest)
    assert spread.isfinite().all()
    assert gradient(spread_rows, rows, *rest, upstream=torch.ones_like(spread)).isfinite().all()
    index = torch.tensor([[4, 1], [0, 9]])
    assert gradient(pick_rows, rows, index, upstream=torch.ones(2, 2, 3, 8)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@implementations("native")
def test_the_number_of_threads_changes_nothing(implementation, dtype, generator):
    rows, *rest = draw((3, 4, 31, 2, (2, 33)), generator, dtype)
    upstream = torch.randn(12, 31, 2, 33, generator=generator).to(dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2):
            torch.set_num_threads(count)
            results.append((spread_rows(rows, *rest), gradient(spread_rows, rows, *rest, upstream=upstream)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@FAST
def test_a_second_backward_repeats_the_first(implementation, generator):
    rows, *rest = draw((2, 3, 6, 2, (5,)), generator)
    rows.requires_grad_()
    loss = spread_rows(rows, *rest).square().sum()
    first = torch.autograd.grad(loss, rows, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, rows)[0], first)


@implementations("auto", "reference")
def test_gradcheck(implementation, generator):
    rows, *rest = draw((2, 3, 4, 1, (2,)), generator, torch.float64)
    assert torch.autograd.gradcheck(lambda x: spread_rows(x, *rest), rows.requires_grad_())
    index = torch.tensor([[3, 0], [1, 2]])
    assert torch.autograd.gradcheck(lambda x: pick_rows(x, index), rows)
    assert torch.autograd.gradgradcheck(lambda x: pick_rows(x, index).square(), rows)


@FAST
def test_gradients_of_gradients(implementation, generator):
    rows, *rest = draw((2, 3, 4, 1, (2, 3)), generator)
    rows.requires_grad_()
    results = []
    for function in (spread_rows, spread_rows_reference):
        (first,) = torch.autograd.grad(function(rows, *rest).pow(3).sum(), rows, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), rows)[0])
    torch.testing.assert_close(*results)


@FAST
def test_registrations(implementation, generator):
    rows, visible, targets, patches = draw((2, 3, 4, 1, (2, 3)), generator)
    rows.requires_grad_()
    torch.library.opcheck(masked_rows._spread, (rows, visible, targets, patches, implementation))
    grad = torch.randn(6, 4, 2, 3, generator=generator, requires_grad=True)
    torch.library.opcheck(masked_rows._gather_spread, (grad, visible, patches, implementation))
    index = torch.tensor([[3, 0], [1, 2]])
    torch.library.opcheck(masked_rows._pick, (rows, index, implementation))
    places = torch.tensor([[0, 3, 1, 5], [2, 4, 3, 0]])
    torch.library.opcheck(place_rows, (grad[:2], places, 6, implementation))


@FAST
def test_compile_and_export(implementation, generator):
    torch.compiler.reset()  # compiled code keeps the implementation that was chosen when it was compiled
    rows, visible, targets, patches = draw((2, 3, 4, 1, (2, 3)), generator)
    index = torch.arange(4).flip(0).expand(6, -1)

    class Rows(torch.nn.Module):
        def forward(self, rows, visible, index):
            return pick_rows(spread_rows(rows, visible, targets, patches), index) * 2

    expected = Rows()(rows, visible, index)
    compiled = torch.compile(Rows(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(rows, visible, index), expected)
    exported = torch.export.export(Rows(), (rows, visible, index)).module()
    assert torch.equal(exported(rows, visible, index), expected)


@implementations("native")
def test_native_refuses_dtypes_that_only_the_reference_sums(implementation, monkeypatch, generator):
    for dtype in (torch.float64, torch.float16, torch.int32):
        rows, *rest = draw((2, 3, 6, 2, (5,)), generator, dtype)
        monkeypatch.setenv("OMNIID_KERNELS", "native")
        words = f"spread_rows runs natively in float32 and bfloat16, got {dtype}; convert or use OMNIID_KERNELS=auto"
        with pytest.raises(ValueError, match=words):
            spread_rows(rows, *rest)
        monkeypatch.setenv("OMNIID_KERNELS", "auto")
        assert torch.equal(spread_rows(rows, *rest), spread_rows_reference(rows, *rest))


@implementations("triton")
def test_triton_refuses_what_it_cannot_take(implementation):
    rows, index = torch.zeros(1, 4, 2), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"spread_rows in Triton takes floating dtypes, got torch.int32"):
        spread_rows(rows.int()[:, :3], index.unsqueeze(0), num_targets=1, num_patches=2)
    with pytest.raises(ValueError, match=r"up to 8 bytes a value, got torch.complex128"):
        pick_rows(rows.to(torch.complex128), index)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", [*SHAPES, (4, 8, 256, 13, (16, 80)), (4, 8, 256, 13, (1280,))], ids=str)
def test_triton_on_a_gpu(shape, dtype, triton_device, poisoned, monkeypatch, generator):
    rows, visible, *rest = draw(shape, generator, dtype)
    rows, visible = rows.to(triton_device), visible.to(triton_device)
    expected = spread_rows_reference(rows, visible, *rest)
    upstream = torch.randn(expected.shape, generator=generator).to(triton_device, dtype)
    exact = gradient(spread_rows_reference, rows.double(), visible, *rest, upstream=upstream.double())
    monkeypatch.setenv("OMNIID_KERNELS", "triton")
    assert torch.equal(spread_rows(rows, visible, *rest), expected)
    first, second = (gradient(spread_rows, rows, visible, *rest, upstream=upstream) for _ in range(2))
    assert torch.equal(first, second)
    assert (first.double() - exact).norm() <= torch.finfo(dtype).eps * exact.norm()
    index = torch.rand(expected.shape[:2], generator=generator).argsort(-1)[:, : shape[2] // 2].to(triton_device)
    assert torch.equal(pick_rows(expected, index), pick_rows_reference(expected, index))
    back = gradient(pick_rows, expected, index, upstream=upstream[:, : index.shape[1]])
    assert torch.equal(back, gradient(pick_rows_reference, expected, index, upstream=upstream[:, : index.shape[1]]))


def test_tiles_follow_from_sizes():
    sizes = {"num_rows": 360, "num_features": 1280}
    assert movement_tiles(**sizes, capability=(9, 0)) == MovementTiles(4, 1024, 4)
    assert movement_tiles(**sizes | {"num_features": 192}, capability=(9, 0)) == MovementTiles(16, 256, 4)
    assert movement_tiles(**sizes | {"num_features": 1}, capability=(9, 0)) == MovementTiles(2048, 2, 4)
    assert movement_tiles(**sizes, capability=None) == MovementTiles(256, 1024, 4)


def test_without_the_library_the_reference_runs(monkeypatch, generator):
    monkeypatch.setattr("omniid.kernels._native_library.library", lambda: None)
    monkeypatch.setenv("OMNIID_KERNELS", "auto")
    rows, *rest = draw((2, 3, 4, 1, (2,)), generator)
    assert torch.equal(spread_rows(rows, *rest), spread_rows_reference(rows, *rest))
    monkeypatch.setenv("OMNIID_KERNELS", "native")
    with pytest.raises(RuntimeError, match="masked_rows cannot run so: the native library is not built"):
        spread_rows(rows, *rest)


@pytest.mark.parametrize(
    ("rows", "visible", "words"),
    [
        (torch.rand(2, 8, 3), torch.zeros(2, 2, 2, dtype=torch.int32), "int64 with T = 2 targets"),
        (torch.rand(2, 8, 3), torch.zeros(2, 3, 2, dtype=torch.int64), "int64 with T = 2 targets"),
        (torch.rand(2, 7, 3), torch.zeros(2, 2, 2, dtype=torch.int64), r"must start with \(2, 8\)"),
        (torch.rand(3, 8, 3), torch.zeros(2, 2, 2, dtype=torch.int64), r"must start with \(2, 8\)"),
        (torch.rand(16), torch.zeros(2, 2, 2, dtype=torch.int64), r"must start with \(2, 8\)"),
        (torch.rand(2, 8, 3, device="meta"), torch.zeros(2, 2, 2, dtype=torch.int64), "visible on cpu"),
    ],
)
@EACH
def test_spread_rows_refuses(implementation, rows, visible, words):
    with pytest.raises(ValueError, match=words):
        spread_rows(rows, visible, num_targets=2, num_patches=4)


@pytest.mark.parametrize(
    ("places", "words"), [([0, 4], "outside 0 .. 3"), ([-1, 0], "outside 0 .. 3"), ([2, 2], "must be distinct")]
)
@FAST
def test_wrong_indices_are_refused(implementation, places, words):
    index = torch.tensor([[0, 1], places])
    with pytest.raises(ValueError, match=f"visible holds .*{words}"):
        spread_rows(torch.rand(2, 6, 3), index.unsqueeze(1), num_targets=1, num_patches=4)
    with pytest.raises(ValueError, match=f"visible holds .*{words}"):
        masked_rows._gather_spread(torch.rand(2, 4, 3), index.unsqueeze(1), 4, implementation)
    with pytest.raises(ValueError, match=f"index holds .*{words}"):
        pick_rows(torch.rand(2, 4, 3), index)


@EACH
def test_pick_rows_refuses(implementation):
    with pytest.raises(ValueError, match=r"index \(S, I\) int64"):
        pick_rows(torch.rand(2, 4, 3), torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="index on cpu"):
        pick_rows(torch.rand(2, 4, 3, device="meta"), torch.zeros(2, 1, dtype=torch.int64))
