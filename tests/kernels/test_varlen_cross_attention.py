"""Packed cross-attention against one sequence at a time in float64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniid.kernels.varlen_cross_attention import varlen_cross_attention


def one_by_one(q, k, v, cu):
    out = []
    for b, (start, end) in enumerate(pairwise(cu)):
        queries = q if q.dim() == 3 else q[b]
        scores = torch.einsum("lhd,shd->hls", queries.double(), k[start:end].double()) * q.shape[-1] ** -0.5
        out.append(torch.einsum("hls,shd->lhd", scores.softmax(-1), v[start:end].double()))
    return torch.stack(out)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    shared=st.booleans(),
    heads=st.sampled_from([1, 3]),
    size=st.sampled_from([32, 80, 128]),
    seed=st.integers(0, 1000),
)
def test_matches_one_sequence_at_a_time(lengths, shared, heads, size, seed):
    g = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    shape = (7, heads, size) if shared else (len(lengths), 7, heads, size)
    q = torch.randn(shape, generator=g)
    k, v = torch.randn(2, int(cu[-1]), heads, size, generator=g)
    torch.testing.assert_close(
        varlen_cross_attention(q, k, v, cu).double(), one_by_one(q, k, v, cu.tolist()), atol=1e-5, rtol=1e-5
    )


def test_gradients(generator):
    cu = torch.tensor([0, 3, 4, 7], dtype=torch.int32)
    q = torch.randn(5, 2, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    k, v = (torch.randn(7, 2, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *x: varlen_cross_attention(*x, cu), (q, k, v))


def test_no_sequences():
    empty = torch.empty(0, 2, 32)
    assert varlen_cross_attention(torch.rand(4, 2, 32), empty, empty, torch.tensor([0])).shape == (0, 4, 2, 32)


@pytest.mark.parametrize(
    ("cu", "message"),
    [
        ([0, 3], "must increase from 0 to the number of keys 5"),
        ([0, 2, 2, 5], "must increase"),
        ([1, 5], "must increase"),
    ],
)
def test_bad_bounds(cu, message):
    k = torch.rand(5, 2, 32)
    with pytest.raises(ValueError, match=message):
        varlen_cross_attention(torch.rand(4, 2, 32), k, k, torch.tensor(cu))


def test_bad_shapes():
    k = torch.rand(5, 2, 32)
    with pytest.raises(ValueError, match="same H and D"):
        varlen_cross_attention(torch.rand(4, 3, 32), k, k, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="q holds 2 sequences"):
        varlen_cross_attention(torch.rand(2, 4, 2, 32), k, k, torch.tensor([0, 5]))
