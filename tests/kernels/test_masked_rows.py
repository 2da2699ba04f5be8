"""Row movements of the masked decoder: the native form against the definition and float64, gradients, refusals."""

from collections.abc import Callable

import pytest
import torch

from omniid.kernels import masked_rows
from omniid.kernels._native_library import library
from omniid.kernels.masked_rows import (
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
    (2, 5, 7, 0, (2, 3, 5)),
    (0, 4, 8, 2, (6,)),
    (2, 1, 3, 3, (129,)),
]


@pytest.fixture(params=["native", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and library() is None:
        pytest.skip("the native library is not built")
    monkeypatch.setenv("OMNIID_KERNELS", request.param)
    return request.param


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    if library() is None:
        pytest.skip("the native library is not built")
    monkeypatch.setenv("OMNIID_KERNELS", "native")


def draw(shape, generator, dtype=torch.float32):
    """Rows (B, N + T V, ...), visible (B, T, V) and the arguments that follow."""
    identities, targets, patches, visible, inner = shape
    rows = torch.randn(identities, patches + targets * visible, *inner, generator=generator).to(dtype)
    noise = torch.rand(identities, targets, patches, generator=generator)
    return rows, noise.argsort(-1)[..., :visible].contiguous(), targets, patches


def gradient(function: Callable, rows, *rest, upstream):
    rows = rows.detach().requires_grad_()
    return torch.autograd.grad(function(rows, *rest), rows, upstream)[0]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spread_rows_against_float64(native, shape, dtype, generator):
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
def test_pick_rows_against_the_definition(native, inner, dtype, generator):
    rows = torch.randn(3, 11, *inner, generator=generator).to(dtype)
    index = torch.rand(3, 11, generator=generator).argsort(-1)[:, :4]  # not contiguous
    picked = pick_rows(rows, index)
    assert torch.equal(picked, pick_rows_reference(rows, index))
    if dtype.is_floating_point:
        upstream = torch.randn(picked.shape, generator=generator).to(dtype)
        expected = gradient(pick_rows_reference, rows, index, upstream=upstream)
        assert torch.equal(gradient(pick_rows, rows, index, upstream=upstream), expected)


def test_empty_picks(implementation):
    assert pick_rows(torch.rand(0, 4, 2), torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, 2)
    assert pick_rows(torch.rand(2, 4, 2), torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 2)


@pytest.mark.parametrize("layout", ["unaligned", "transposed", "heads first", "values apart", "repeated"])
def test_spread_rows_of_any_layout(native, layout, generator):
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


def test_every_value_is_written(native, monkeypatch, generator):
    poisoned = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *size: poisoned(x, *size).fill_(torch.nan))
    rows, *rest = draw((2, 3, 6, 2, (3, 8)), generator)
    spread = spread_rows(rows, *rest)
    assert spread.isfinite().all()
    assert gradient(spread_rows, rows, *rest, upstream=torch.ones_like(spread)).isfinite().all()
    index = torch.tensor([[4, 1], [0, 9]])
    assert gradient(pick_rows, rows, index, upstream=torch.ones(2, 2, 3, 8)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_number_of_threads_changes_nothing(native, dtype, generator):
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


def test_a_second_backward_repeats_the_first(native, generator):
    rows, *rest = draw((2, 3, 6, 2, (5,)), generator)
    rows.requires_grad_()
    loss = spread_rows(rows, *rest).square().sum()
    first = torch.autograd.grad(loss, rows, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, rows)[0], first)


def test_gradcheck(implementation, generator):
    rows, *rest = draw((2, 3, 4, 1, (2,)), generator, torch.float64)
    assert torch.autograd.gradcheck(lambda x: spread_rows(x, *rest), rows.requires_grad_())
    index = torch.tensor([[3, 0], [1, 2]])
    assert torch.autograd.gradcheck(lambda x: pick_rows(x, index), rows)
    assert torch.autograd.gradgradcheck(lambda x: pick_rows(x, index).square(), rows)


def test_gradients_of_gradients(native, generator):
    rows, *rest = draw((2, 3, 4, 1, (2, 3)), generator)
    rows.requires_grad_()
    results = []
    for function in (spread_rows, spread_rows_reference):
        (first,) = torch.autograd.grad(function(rows, *rest).pow(3).sum(), rows, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), rows)[0])
    torch.testing.assert_close(*results)


def test_registrations(native, generator):
    rows, visible, targets, patches = draw((2, 3, 4, 1, (2, 3)), generator)
    rows.requires_grad_()
    torch.library.opcheck(masked_rows._spread, (rows, visible, targets, patches))
    grad = torch.randn(6, 4, 2, 3, generator=generator, requires_grad=True)
    torch.library.opcheck(masked_rows._gather_spread, (grad, visible, patches))
    index = torch.tensor([[3, 0], [1, 2]])
    torch.library.opcheck(masked_rows._pick, (rows, index))
    torch.library.opcheck(place_rows, (grad[:2], torch.tensor([[0, 3, 1, 5], [2, 4, 3, 0]]), 6))


def test_compile_and_export(native, generator):
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
def test_spread_rows_refuses(implementation, rows, visible, words):
    with pytest.raises(ValueError, match=words):
        spread_rows(rows, visible, num_targets=2, num_patches=4)


@pytest.mark.parametrize(
    ("places", "words"), [([0, 4], "outside 0 .. 3"), ([-1, 0], "outside 0 .. 3"), ([2, 2], "must be distinct")]
)
def test_wrong_indices_are_refused(native, places, words):
    index = torch.tensor([[0, 1], places])
    with pytest.raises(ValueError, match=f"visible holds .*{words}"):
        spread_rows(torch.rand(2, 6, 3), index.unsqueeze(1), num_targets=1, num_patches=4)
    with pytest.raises(ValueError, match=f"visible holds .*{words}"):
        masked_rows._gather_spread(torch.rand(2, 4, 3), index.unsqueeze(1), 4)
    with pytest.raises(ValueError, match=f"index holds .*{words}"):
        pick_rows(torch.rand(2, 4, 3), index)


def test_pick_rows_refuses(implementation):
    with pytest.raises(ValueError, match=r"index \(S, I\) int64"):
        pick_rows(torch.rand(2, 4, 3), torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="index on cpu"):
        pick_rows(torch.rand(2, 4, 3, device="meta"), torch.zeros(2, 1, dtype=torch.int64))
