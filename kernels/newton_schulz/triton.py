"""Newton-Schulz in Triton: the symmetric products, of which only the upper tiles are computed; each is written twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.architecture import architecture, dot_precision
from kernels.newton_schulz.chunked import iterate
from kernels.newton_schulz.coefficients import Coefficients
from kernels.tuning import parameters

DEFAULTS: dict[str, dict[str, dict[str, int]]] = {
    "symmetric_product": {"generic": {"BLOCK": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}},
}
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "symmetric_product": [
        {"BLOCK": block, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for block, warps in ((64, 4), (128, 4), (128, 8))
        for k in (32, 64)
        for stages in (2, 3)
    ],
}


@triton.jit
def corner(p):
    """(i, j), j <= i, of tile p in the order of a lower triangle's rows: p = i (i + 1) / 2 + j. int32, p below 2^29."""
    # Roots are rounded, and approximate on some devices: at either end of a row the guess may be one row off.
    return settle(p, ((tl.sqrt(8.0 * p.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32))


@triton.jit
def settle(p, i):
    """As corner, from a guess of i that is at most one off."""
    i = tl.where(i * (i + 1) // 2 > p, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= p, i + 1, i)
    return i, p - i * (i + 1) // 2


@triton.jit(do_not_specialize=["alpha", "beta", "diagonal"])
def symmetric_product_kernel(
    a, b, add, out, m, k, alpha, beta, diagonal,
    a_batch, a_row, a_column, b_batch, b_row, b_column, add_batch, add_row, out_batch, out_row,
    HAS_ADD: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [B, m, m] = alpha a b^T + beta add + diagonal I, which is symmetric. Grid: (upper tiles, B).

    a, b [B, m, k] with any strides; add and out with contiguous rows.
    """
    i, j = corner(tl.program_id(0))
    batch = tl.cast(tl.program_id(1), tl.int64)
    lows = (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)  # j <= i: the tile above the diagonal has rows `lows`
    highs = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    a_tile = a + batch * a_batch + lows[:, None] * a_row + ks[None, :] * a_column
    b_tile = b + batch * b_batch + highs[None, :] * b_row + ks[:, None] * b_column
    total = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        left = tl.load(a_tile, mask=(lows[:, None] < m) & (ks[None, :] < k - start), other=0.0)
        right = tl.load(b_tile, mask=(highs[None, :] < m) & (ks[:, None] < k - start), other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        a_tile += BLOCK_K * a_column
        b_tile += BLOCK_K * b_column
    total *= alpha
    inside = (lows[:, None] < m) & (highs[None, :] < m)
    if HAS_ADD:
        place = add + batch * add_batch + lows[:, None] * add_row + highs[None, :]
        total += beta * tl.load(place, mask=inside, other=0.0).to(tl.float32)
    total += tl.where(lows[:, None] == highs[None, :], diagonal, 0.0)
    value = total.to(out.dtype.element_ty)
    here = out + batch * out_batch
    tl.store(here + lows[:, None] * out_row + highs[None, :], value, mask=inside)
    if i != j:
        tl.store(here + highs[:, None] * out_row + lows[None, :], tl.trans(value), mask=tl.trans(inside))


def symmetric_product_triton(
    a: Tensor, b: Tensor, alpha: float = 1.0, add: Tensor | None = None, beta: float = 1.0, diagonal: float = 0.0
) -> Tensor:
    """As kernels.newton_schulz.chunked.Product says. a, b [B, m, k]; add [B, m, m] with contiguous rows."""
    B, m, k = a.shape
    assert b.shape == a.shape and (add is None or (add.shape == (B, m, m) and add.stride(2) == 1))
    out = torch.empty(B, m, m, dtype=a.dtype, device=a.device)
    arch = architecture(a.device)
    use = parameters("symmetric_product", arch, defaults=DEFAULTS, M=m, K=k, bytes=a.element_size())
    precision = dot_precision(arch, "inverse")  # errors multiply here, too
    tiles = triton.cdiv(m, use["BLOCK"])
    given = out if add is None else add
    symmetric_product_kernel[(tiles * (tiles + 1) // 2, B)](
        a, b, given, out, m, k, float(alpha), float(beta), float(diagonal), *a.stride(), *b.stride(),
        given.stride(0), given.stride(1), out.stride(0), out.stride(1), HAS_ADD=add is not None, PRECISION=precision, **use,
    )  # fmt: skip
    return out


def newton_schulz_triton(x: Tensor, coefficients: Coefficients, gram: bool | None = None) -> Tensor:
    """x [..., m, n], fp32, fp16 or bf16. gram: which form; None: the one with fewer operations."""
    return iterate(x, coefficients, symmetric_product_triton, gram, half=True)
