"""Dense attention: both forms against float64."""

import pytest
import torch

from omniid.kernels.dense_attention import dense_attention, dense_attention_reference


def exact(q, k, v, scale):
    scores = torch.einsum("blhd,bshd->bhls", q.double(), k.double()) * scale
    return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v.double())


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 32), (2, 7, 13, 80), (3, 65, 257, 64), (1, 256, 256, 32)], ids=str)
def test_matches_float64(shape, train, generator):
    batch, queries, keys, size = shape
    q = torch.randn(batch, queries, 2, size, generator=generator, requires_grad=train)
    k, v = torch.randn(2, batch, keys, 2, size, generator=generator)
    torch.testing.assert_close(dense_attention(q, k, v).double(), exact(q, k, v, size**-0.5), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dense_attention(q, k, v, scale=0.5).double(), exact(q, k, v, 0.5), atol=1e-5, rtol=1e-5)


def test_gradients(generator):
    q, k, v = (torch.randn(2, n, 2, 3, dtype=torch.float64, generator=generator, requires_grad=True) for n in (4, 5, 5))
    assert torch.autograd.gradcheck(dense_attention, (q, k, v))
    assert torch.autograd.gradcheck(dense_attention_reference, (q, k, v))


@pytest.mark.parametrize("batch, length", [(1, 8), (32, 64), (1, 256)])
def test_gradients_are_those_of_the_products(batch, length, generator):
    """Whichever form is taken: for a few short sequences, for many, for long ones."""
    tensors = [torch.randn(batch, length, 2, 16, generator=generator, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(batch, length, 2, 16, generator=generator)
    got = torch.autograd.grad(dense_attention(*tensors), tensors, upstream)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    wanted = torch.autograd.grad(exact(*doubles, 16**-0.5), doubles, upstream.double())
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-4)


def test_bad_shapes():
    q = torch.rand(2, 4, 2, 32)
    with pytest.raises(ValueError, match="same B, H and D"):
        dense_attention(q, q[:1], q[:1])
