"""Cross-attention from a fixed set of queries to sequences of uneven length, packed without padding.

    out[b] = softmax(q[b] k[b]^T * scale) v[b],   k[b] = k[cu_seqlens_k[b] : cu_seqlens_k[b + 1]]

The identity encoder reads all photos of a person at once (Eq. 1): identities have different numbers of photos, so
their keys are packed and no position is ever padded or masked.
Shapes: B sequences, Lq queries, T keys in all, H heads, D head size.
"""

from itertools import pairwise

import torch
from torch import Tensor

from .dense_attention import dense_attention


def varlen_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_k: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attention output (B, Lq, H, D) in the dtype of `q`.

    q: (B, Lq, H, D), or (Lq, H, D) shared by all sequences. k, v: (T, H, D). cu_seqlens_k: (B + 1) int32, increasing
    from 0 to T. scale: default 1 / sqrt(D). Raises ValueError for shapes that do not fit.
    """
    _check(q, k, v, cu_seqlens_k)
    bounds = cu_seqlens_k.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    num_sequences = len(lengths)
    shared = q.dim() == 3
    # Sequences of one length form a dense batch: exact, no padding, and as few calls as there are distinct lengths.
    pieces, order = [], []
    for length in sorted(set(lengths)):
        members = [i for i, n in enumerate(lengths) if n == length]
        if len(members) == num_sequences:
            keys, values = (x.view(num_sequences, length, *x.shape[1:]) for x in (k, v))
            queries = q.expand(num_sequences, *q.shape) if shared else q
        else:
            rows = torch.cat([torch.arange(bounds[i], bounds[i + 1], device=k.device) for i in members])
            keys, values = (x[rows].view(len(members), length, *x.shape[1:]) for x in (k, v))
            queries = q.expand(len(members), *q.shape) if shared else q[members]
        pieces.append(dense_attention(queries, keys, values, scale=scale))
        order += members
    if not pieces:
        return q.new_empty(0, *q.shape[-3:])
    if len(pieces) == 1:
        return pieces[0]
    inverse = torch.tensor(order, device=q.device).argsort()
    return torch.cat(pieces)[inverse]


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_k: Tensor) -> None:
    if q.dim() not in (3, 4) or k.dim() != 3 or k.shape != v.shape or q.shape[-2:] != k.shape[-2:]:
        raise ValueError(
            "q must be (Lq, H, D) or (B, Lq, H, D) and k, v (T, H, D) with the same H and D; "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    bounds = cu_seqlens_k.tolist()
    if (
        not bounds
        or bounds[0] != 0
        or bounds[-1] != len(k)
        or any(b <= a for a, b in pairwise(bounds))
    ):
        raise ValueError(f"cu_seqlens_k must increase from 0 to the number of keys {len(k)}, got {bounds}")
    if q.dim() == 4 and q.shape[0] != len(bounds) - 1:
        raise ValueError(f"q holds {q.shape[0]} sequences but cu_seqlens_k {len(bounds) - 1}")
