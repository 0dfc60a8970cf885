"""Causal products of queries and keys inside a chunk where every channel decays by itself: A and P of `chunked.py`, and
their gradient.

The decay is inside the product. A lower triangle of C x C splits in squares: for s = 1, 2, 4 .. C / 2, the rows of each odd
run of s tokens against the columns of the even run before it. In such a square the decay from column j to row i is
prefix[i] * suffix[j]: the decay from the start of i's run through i, times that after j to the end of j's run. So each square
is one matrix product. (GLA and KDA put one reference inside each block of 16 and treat the 16 x 16 triangle elementwise;
squares down to s = 1 leave no triangle.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.delta_rule.decays import Decays, doubling, lower_blocks, runs


def channel_scores(X: Tensor, w: Tensor, decays: Decays, operands: torch.dtype) -> Tensor:
    """Products of rows X [M, 2, C, K], queries and keys, with columns w [M, C, K], decayed from column to row.

    Returns [M, 2, C, C]: for queries the lower triangle with its diagonal, for keys strictly below it; the rest is zero.
    The operands of matrix products, decayed, are rounded to the dtype `operands`.
    """
    M, _, C, _ = X.shape
    out = X.new_zeros(M, 2, C, C)
    out[:, 0].diagonal(dim1=1, dim2=2).copy_((X[:, 0] * w).sum(-1))
    for s, prefix, suffix in doubling(decays.alpha):
        if s < C:
            rows, columns = _square_operands(X, w, prefix, suffix, s, operands)
            lower_blocks(out, s).copy_((rows @ columns.mT).unflatten(2, (2, s)).transpose(1, 2))
    return out


def channel_scores_backward(
    dscore: Tensor, X: Tensor, w: Tensor, decays: Decays
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `channel_scores` through the squares under the diagonal: dX, dw and dG [M, C, K], the gradient
    towards the running sum of g; and dscore's diagonal [M, C, 1], which has no decay and is left to the caller.
    """
    C = w.shape[1]
    dX, dw = torch.zeros_like(X), torch.zeros_like(w)
    for s, prefix, suffix in doubling(decays.alpha):
        if s < C:
            rows, columns = _square_operands(X, w, prefix, suffix, s, dscore.dtype)
            square = lower_blocks(dscore, s).transpose(1, 2).reshape(-1, C // (2 * s), 2 * s, s)
            drows = (square @ columns).unflatten(2, (2, s)).transpose(1, 2)
            runs(dX, s, 1).addcmul_(drows.to(X.dtype), runs(prefix, s, 1)[:, None])
            runs(dw, s, 0).addcmul_((square.mT @ rows).to(X.dtype), runs(suffix, s, 0))
    dG = (X * dX).sum(1).addcmul_(w, dw, value=-1.0)
    return dX, dw, dG, dscore[:, 0].diagonal(dim1=1, dim2=2)[..., None].to(X.dtype)


def _square_operands(
    X: Tensor, w: Tensor, prefix: Tensor, suffix: Tensor, s: int, operands: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Decayed rows [M, C / 2s, 2s, K] (queries above keys) and columns [M, C / 2s, s, K] of the squares of size s."""
    M, _, C, K = X.shape
    rows = X.new_empty(M, C // (2 * s), 2, s, K, dtype=operands)
    torch.mul(runs(X, s, 1).transpose(1, 2), runs(prefix, s, 1)[:, :, None], out=rows)
    columns = X.new_empty(M, C // (2 * s), s, K, dtype=operands)
    torch.mul(runs(w, s, 0), runs(suffix, s, 0), out=columns)
    return rows.flatten(2, 3), columns
