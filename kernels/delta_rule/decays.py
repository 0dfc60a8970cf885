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
    """Decays within each chunk. D is 1 (one decay per head) or K (one per channel)."""

    alpha: Tensor  # [M, C, D] one step's
    from_start: Tensor  # [M, C, D] from before the chunk through the step
    to_end: Tensor  # [M, C, D] after the step to the end of the chunk
    pair: Tensor | None  # [M, C, C] from column to row, zero above the diagonal; only where D is 1

    @property
    def whole(self) -> Tensor:
        """[M, D, 1] over the chunk."""
        return self.from_start[:, -1, :, None]


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


def chunk_decays(alpha: Tensor) -> Decays:
    """alpha [M, C, D] -> the decays within each chunk."""
    M, C, D = alpha.shape
    pair = None
    if D == 1:
        pair = alpha.new_zeros(M, C, C)
        pair.diagonal(dim1=1, dim2=2).fill_(1)
    prefix = suffix = alpha
    for s, prefix, suffix in doubling(alpha):
        if s < C and pair is not None:
            torch.mul(runs(prefix, s, 1), runs(suffix, s, 0).mT, out=lower_blocks(pair, s))
    return Decays(alpha, prefix, suffix, pair)


def scores(X: Tensor, w: Tensor, decays: Decays | None, operands: torch.dtype) -> Tensor:
    """Causal products of rows X [M, 2, C, K], queries and keys, with columns w [M, C, K], decayed from column to row.

    Returns [M, 2, C, C] in X's dtype: for queries the lower triangle with its diagonal, for keys strictly below it.
    Matrix products round their operands to the dtype `operands`.
    """
    M, _, C, K = X.shape
    if decays is None or decays.pair is not None:
        out = torch.bmm(X.view(M, 2 * C, K).to(operands), w.to(operands).mT).to(X.dtype)
        return _mask_(out.view(M, 2, C, C), decays)
    out = X.new_zeros(M, 2, C, C)
    out[:, 0].diagonal(dim1=1, dim2=2).copy_((X[:, 0] * w).sum(-1))
    for s, prefix, suffix in doubling(decays.alpha):
        if s < C:
            rows, columns = _square_operands(X, w, prefix, suffix, s, operands)
            lower_blocks(out, s).copy_((rows @ columns.mT).unflatten(2, (2, s)).transpose(1, 2))
    return out


def scores_backward(
    dscore: Tensor, score: Tensor, X: Tensor, w: Tensor, decays: Decays | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `scores`, given the scores and their gradient, which may hold anything outside the triangles.

    Returns dX [M, 2, C, K], dw [M, C, K] and dG [M, C, D], the gradient towards the running sum of g. Overwrites
    dscore. Matrix products round their operands to dscore's dtype. The diagonal has no decay; it is kept out of dG,
    where it would leave only rounding errors.
    """
    M, _, C, K = X.shape
    operands = dscore.dtype
    if decays is None or decays.pair is not None:
        dG = None
        if decays is not None:
            slope = dscore * score
            slope[:, 0].diagonal(dim1=1, dim2=2).zero_()
            dG = (slope.sum((1, 3), dtype=X.dtype) - slope.sum((1, 2), dtype=X.dtype))[..., None]
        flat = _mask_(dscore, decays).view(M, 2 * C, C)
        dX = torch.bmm(flat, w.to(operands)).view(X.shape)
        return dX.to(X.dtype), torch.bmm(flat.mT, X.view(M, 2 * C, K).to(operands)).to(X.dtype), dG
    dX, dw = torch.zeros_like(X), torch.zeros_like(w)
    for s, prefix, suffix in doubling(decays.alpha):
        if s < C:
            rows, columns = _square_operands(X, w, prefix, suffix, s, operands)
            square = lower_blocks(dscore, s).transpose(1, 2).reshape(-1, C // (2 * s), 2 * s, s)
            drows = (square @ columns).unflatten(2, (2, s)).transpose(1, 2)
            runs(dX, s, 1).addcmul_(drows.to(X.dtype), runs(prefix, s, 1)[:, None])
            runs(dw, s, 0).addcmul_((square.mT @ rows).to(X.dtype), runs(suffix, s, 0))
    dG = (X * dX).sum(1).addcmul_(w, dw, value=-1.0)
    diagonal = dscore[:, 0].diagonal(dim1=1, dim2=2)[..., None].to(X.dtype)
    dX[:, 0].addcmul_(diagonal, w)
    dw.addcmul_(diagonal, X[:, 0])
    return dX, dw, dG


def _mask_(pairs: Tensor, decays: Decays | None) -> Tensor:
    """Decays [M, 2, C, C] where a head has one decay, and zeroes it above the diagonal; for keys also on it."""
    if decays is None:
        pairs[:, 0].tril_()
        pairs[:, 1].tril_(-1)
    else:
        assert decays.pair is not None
        pairs.mul_(decays.pair[:, None])
        pairs[:, 1].diagonal(dim1=1, dim2=2).zero_()
    return pairs


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
