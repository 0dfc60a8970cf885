"""Decays inside a chunk, by doubling, and the causal products of queries and keys under them.

Every factor here is a product of step decays alpha = exp(g) <= 1 over a run of neighbouring steps. Nothing is divided
and no exponent is a difference of sums, so nothing overflows, a decay of 0 (g = -inf) is exact, and relative precision
survives an erasing step in the middle of a chunk, where cumulative sums of g would have lost it.

A lower triangle of C x C splits in squares: for s = 1, 2, 4 .. C / 2, the rows of each odd run of s tokens against the
columns of the even run before it. In such a square the decay from column j to row i is prefix[i] * suffix[j]: the
decay from the start of i's run through i, times that after j to the end of j's run. So each square is one matrix
product also where every channel decays by itself. (GLA and KDA put one reference inside each block of 16 and treat the
16 x 16 triangle elementwise; squares down to s = 1 leave no triangle.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Decays:
    """Decays within each chunk; None where the gate is none. D is 1 (one decay per head) or K (one per channel)."""

    alpha: Tensor | None  # [M, C, D] one step's
    from_start: Tensor | None  # [M, C, D] from before the chunk through the step
    to_end: Tensor | None  # [M, C, D] after the step to the end of the chunk
    whole: Tensor | None  # [M, D, 1] over the chunk

    @property
    def per_channel(self) -> bool:
        return self.alpha is not None and self.alpha.shape[-1] > 1


def lower_blocks(x: Tensor, s: int) -> Tensor:
    """x [..., C, C] -> view [..., C / 2s, s, s] of the squares of size s under the diagonal."""
    return (
        x.unflatten(-2, (-1, 2, s))
        .unflatten(-1, (-1, 2, s))
        .select(-2, 0)
        .select(-4, 1)
        .diagonal(dim1=-4, dim2=-2)
        .movedim(-1, -3)
    )


def doubling(alpha: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (s, prefix, suffix) for s = 1, 2, 4 .. C, for alpha [M, C, D].

    prefix, suffix [M, C, D]: the decay from the start of the run of s tokens through the token; after the token to the
    end of the run. They are overwritten as the iterator goes on.
    """
    prefix, suffix, s, C = alpha.clone(), torch.ones_like(alpha), 1, alpha.shape[1]
    yield s, prefix, suffix
    while s < C:
        before, after = prefix.unflatten(1, (-1, 2, s)), suffix.unflatten(1, (-1, 2, s))
        after[:, :, 0] *= before[:, :, 1, -1:]
        before[:, :, 1] *= before[:, :, 0, -1:]
        s *= 2
        yield s, prefix, suffix


def runs(x: Tensor, s: int, odd: int) -> Tensor:
    """x [..., C, D] -> view [..., C / 2s, s, D] of its odd (1) or even (0) runs of s tokens."""
    return x.unflatten(-2, (-1, 2, s)).select(-3, odd)


def scores(X: Tensor, w: Tensor, alpha: Tensor | None) -> tuple[Tensor, Decays]:
    """Causal products of rows X with columns w, decayed from column to row.

    X [M, 2, C, K]: queries and keys; w [M, C, K]; alpha None, [M, C, 1] or [M, C, K].
    Returns [M, 2, C, C]: for queries the lower triangle with its diagonal, for keys strictly below it; and the decays.
    """
    M, _, C, _ = X.shape
    if alpha is None:
        return mask_(_products(X, w)), Decays(None, None, None, None)
    if alpha.shape[-1] == 1:
        pair, decays = pair_decays(alpha)
        return mask_(_products(X, w).mul_(pair[:, None])), decays
    out = X.new_zeros(M, 2, C, C)
    out[:, 0].diagonal(dim1=1, dim2=2).copy_((X[:, 0] * w).sum(-1))
    prefix = suffix = alpha
    for s, prefix, suffix in doubling(alpha):
        if s < C:
            rows, columns = _square_operands(X, w, prefix, suffix, s)
            lower_blocks(out, s).copy_((rows @ columns.mT).unflatten(2, (2, s)).transpose(1, 2))
    return out, Decays(alpha, prefix, suffix, prefix[:, -1, :, None])


def scores_backward(
    dM: Tensor, X: Tensor, w: Tensor, decays: Decays, score: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `scores`, given dM [M, 2, C, C] (zero outside the triangles) and the scores themselves.

    Returns dX [M, 2, C, K], dw [M, C, K] and dG [M, C, D], the gradient towards the running sum of g.
    The diagonal has no decay; it is kept out of dG, where it would leave only rounding errors.
    """
    M, _, C, K = X.shape
    if not decays.per_channel:
        dG = None
        if decays.alpha is not None:
            slope = dM * score
            slope[:, 0].diagonal(dim1=1, dim2=2).zero_()
            dG = (slope.sum((1, 3)) - slope.sum((1, 2)))[..., None]
            dM = dM * pair_decays(decays.alpha)[0][:, None]
        flat = dM.view(M, 2 * C, C)
        return torch.bmm(flat, w).view_as(X), torch.bmm(flat.mT, X.reshape(M, 2 * C, K)), dG
    dX, dw = torch.zeros_like(X), torch.zeros_like(w)
    for s, prefix, suffix in doubling(decays.alpha):
        if s < C:
            rows, columns = _square_operands(X, w, prefix, suffix, s)
            square = lower_blocks(dM, s).transpose(1, 2).reshape(-1, C // (2 * s), 2 * s, s)
            d_rows = (square @ columns).unflatten(2, (2, s)).transpose(1, 2)
            runs(dX, s, 1).addcmul_(d_rows, runs(prefix, s, 1)[:, None])
            runs(dw, s, 0).addcmul_(square.mT @ rows, runs(suffix, s, 0))
    dG = (X * dX).sum(1) - w * dw
    diagonal = dM[:, 0].diagonal(dim1=1, dim2=2)[..., None]
    dX[:, 0] += diagonal * w
    dw += diagonal * X[:, 0]
    return dX, dw, dG


def pair_decays(alpha: Tensor) -> tuple[Tensor, Decays]:
    """alpha [M, C, 1] -> the decay from column to row [M, C, C], zero above the diagonal; and the chunk's decays."""
    M, C, _ = alpha.shape
    pair = alpha.new_zeros(M, C, C)
    pair.diagonal(dim1=1, dim2=2).fill_(1)
    prefix = suffix = alpha
    for s, prefix, suffix in doubling(alpha):
        if s < C:
            torch.mul(runs(prefix, s, 1), runs(suffix, s, 0).mT, out=lower_blocks(pair, s))
    return pair, Decays(alpha, prefix, suffix, prefix[:, -1, :, None])


def mask_(pairs: Tensor) -> Tensor:
    """Zeroes [M, 2, C, C] above the diagonal (queries), on and above it (keys)."""
    pairs[:, 0].tril_()
    pairs[:, 1].tril_(-1)
    return pairs


def _products(X: Tensor, w: Tensor) -> Tensor:
    M, _, C, K = X.shape
    return torch.bmm(X.reshape(M, 2 * C, K), w.mT).view(M, 2, C, C)


def _square_operands(X: Tensor, w: Tensor, prefix: Tensor, suffix: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """Decayed rows [M, C / 2s, 2s, K] (queries above keys) and columns [M, C / 2s, s, K] of the squares of size s."""
    M, _, C, K = X.shape
    rows = X.new_empty(M, C // (2 * s), 2, s, K)
    torch.mul(runs(X, s, 1).transpose(1, 2), runs(prefix, s, 1)[:, :, None], out=rows)
    return rows.flatten(2, 3), runs(w, s, 0) * runs(suffix, s, 0)
