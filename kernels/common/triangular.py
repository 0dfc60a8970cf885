"""Inverse of a unit lower triangular tile by doubling the size of inverted diagonal blocks.

    inverse [[A, 0], [B, D]] = [[A', 0], [-D' B A', D']]    with A' = inverse A, D' = inverse D

With X = blockdiag(A', D') the right-hand side is X - X B X, so one level costs two products and inverts all pairs of
blocks of the tile at once. Unlike the Neumann product (I - L)(I + L^2)(I + L^4)..., whose powers grow like binomial
coefficients when keys are correlated and then cancel, every term here is a true inverse and stays bounded.
Blocks up to 16 x 16 are handled as a batch of tiles, which is the shape of one matrix instruction per warp.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _diagonal_blocks(m, n: tl.constexpr, S: tl.constexpr):
    """[n S, n S] -> the n diagonal blocks [n, S, S]."""
    block = tl.arange(0, n)
    same = block[:, None, None, None] == block[None, None, :, None]
    return tl.sum(tl.where(same, tl.reshape(m, [n, S, n, S]), 0.0), axis=2)


@triton.jit
def _block_diagonal(x, n: tl.constexpr, S: tl.constexpr):
    """n blocks [n, S, S] -> n / 2 block-diagonal pairs [n / 2, 2 S, 2 S]."""
    pair = tl.arange(0, 2)
    same = pair[None, :, None, None, None] == pair[None, None, None, :, None]
    wide = tl.where(same, tl.reshape(x, [n // 2, 2, S, 1, S]), 0.0)
    return tl.reshape(wide, [n // 2, 2 * S, 2 * S])


@triton.jit
def _below(S: tl.constexpr, s: tl.constexpr):
    """[S, S]: the lower left s x s block of each 2 s x 2 s diagonal block."""
    i = tl.arange(0, S)[:, None]
    j = tl.arange(0, S)[None, :]
    return (i // (2 * s) == j // (2 * s)) & (i // s > j // s)


@triton.jit
def _double(x, below, PRECISION: tl.constexpr):
    return x - tl.dot(x, tl.dot(below, x, input_precision=PRECISION), input_precision=PRECISION)


@triton.jit
def unit_lower_inverse(lower, BT: tl.constexpr, PRECISION: tl.constexpr):
    """(I + lower)^-1 for a strictly lower triangular fp32 tile [BT, BT], BT in 16, 32, 64."""
    tl.static_assert(BT == 16 or BT == 32 or BT == 64, "the tile must be 16, 32 or 64 wide")
    i = tl.arange(0, 16)[:, None]
    j = tl.arange(0, 16)[None, :]
    identity = tl.where(i == j, 1.0, 0.0)
    if BT == 16:
        x = identity - tl.where(_below(16, 1), lower, 0.0)
        x = _double(x, tl.where(_below(16, 2), lower, 0.0), PRECISION)
        x = _double(x, tl.where(_below(16, 4), lower, 0.0), PRECISION)
        x = _double(x, tl.where(_below(16, 8), lower, 0.0), PRECISION)
    else:
        blocks = _diagonal_blocks(lower, BT // 16, 16)
        b = identity[None, :, :] - tl.where(_below(16, 1)[None, :, :], blocks, 0.0)
        b = _double(b, tl.where(_below(16, 2)[None, :, :], blocks, 0.0), PRECISION)
        b = _double(b, tl.where(_below(16, 4)[None, :, :], blocks, 0.0), PRECISION)
        b = _double(b, tl.where(_below(16, 8)[None, :, :], blocks, 0.0), PRECISION)
        if BT == 64:
            pairs = _diagonal_blocks(lower, 2, 32)
            b = _double(_block_diagonal(b, 4, 16), tl.where(_below(32, 16)[None, :, :], pairs, 0.0), PRECISION)
        x = tl.reshape(_block_diagonal(b, 2, BT // 2), [BT, BT])
        x = _double(x, tl.where(_below(BT, BT // 2), lower, 0.0), PRECISION)
    return x
