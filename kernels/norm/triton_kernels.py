"""Triton kernels of the norms: one forward and one backward serve the RMS norm, the L2 norm and the gated RMS norm.

With a(gate) the activated gate, u the normalised vector, r = (sum u^2 [/ D] + eps)^(-1/2) and n = u r:

    GATE 0  u = x             y = n w
    GATE 1  u = x             y = n w a(gate)      (norm first)
    GATE 2  u = x a(gate)     y = n w              (gate first)

RESIDUAL: x is the sum of two tensors, which the forward adds and stores as `total`; the backward reads that sum as its x,
adds the sum's own gradient to du, and stores it in both dtypes where the two tensors differ in theirs.

Backward, with c = dy w [a(gate)]: du = r (c - n sum(c n) [/ D]), exact with eps. A whole row lies in one tile, so that x
is read once; rows are short (D <= 8192), and narrow rows (heads) share a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _activate(gate, SILU: tl.constexpr):
    """(a(gate), its derivative), fp32."""
    s = tl.sigmoid(gate)
    if SILU:
        return gate * s, s * (1.0 + gate * (1.0 - s))
    return s, s * (1.0 - s)


@triton.jit(do_not_specialize=["R"])
def forward_kernel(
    x, gate, weight, y, scales, residual, total, R, eps, stride_x, stride_gate, stride_residual,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    MEAN: tl.constexpr, GATE: tl.constexpr, SILU: tl.constexpr, HAS_WEIGHT: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """y [R, D] and scales [R] (the r above, fp32). Grid: row tiles."""
    first = tl.cast(tl.program_id(0), tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    mask = (row < R)[:, None] & (d < D)[None, :]
    u = tl.load(x + row[:, None] * stride_x + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        u += tl.load(residual + row[:, None] * stride_residual + d[None, :], mask=mask, other=0.0).to(tl.float32)
        rounded = u.to(total.dtype.element_ty)
        tl.store(total + row[:, None] * D + d[None, :], rounded, mask=mask)
        u = rounded.to(tl.float32)  # what the backward will read
    if GATE != 0:
        a, _ = _activate(
            tl.load(gate + row[:, None] * stride_gate + d[None, :], mask=mask, other=0.0).to(tl.float32), SILU
        )
        if GATE == 2:
            u *= a
    square = tl.sum(u * u, axis=1)
    if MEAN:
        square /= D
    r = 1.0 / tl.sqrt(square + eps)
    out = u * r[:, None]
    if HAS_WEIGHT:
        out *= tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if GATE == 1:
        out *= a
    tl.store(scales + row, r, mask=row < R)
    tl.store(y + row[:, None] * D + d[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def backward_kernel(
    x, gate, weight, dy, scales, dx, dgate, partials, d_total, d_low, R, tiles, stride_x, stride_gate,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    MEAN: tl.constexpr, GATE: tl.constexpr, SILU: tl.constexpr, HAS_WEIGHT: tl.constexpr, RESIDUAL: tl.constexpr,
    BOTH: tl.constexpr,
):  # fmt: skip
    """dx, dgate [R, D], and per program the weight gradient of its `tiles` row tiles (partials [P, D])."""
    pid = tl.cast(tl.program_id(0), tl.int64)
    d = tl.arange(0, BLOCK_D)
    if HAS_WEIGHT:
        w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
        dw = tl.zeros([BLOCK_D], dtype=tl.float32)
    for tile in range(tiles):
        row = (pid * tiles + tile) * ROWS + tl.arange(0, ROWS)
        mask = (row < R)[:, None] & (d < D)[None, :]
        value = tl.load(x + row[:, None] * stride_x + d[None, :], mask=mask, other=0.0).to(tl.float32)
        c = tl.load(dy + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        r = tl.load(scales + row, mask=row < R, other=0.0)[:, None]
        n = value * r
        if GATE != 0:
            z = tl.load(gate + row[:, None] * stride_gate + d[None, :], mask=mask, other=0.0).to(tl.float32)
            a, slope = _activate(z, SILU)
        if GATE == 2:
            n *= a
        if GATE == 1:
            dz = c * n * slope
            if HAS_WEIGHT:
                dz *= w[None, :]
            c *= a
        if HAS_WEIGHT:
            dw += tl.sum(c * n, axis=0)
            c *= w[None, :]
        along = tl.sum(c * n, axis=1)
        if MEAN:
            along /= D
        du = r * (c - n * along[:, None])
        if GATE == 2:
            dz = du * value * slope
            du *= a
        if GATE != 0:
            tl.store(dgate + row[:, None] * D + d[None, :], dz.to(dgate.dtype.element_ty), mask=mask)
        if RESIDUAL:
            du += tl.load(d_total + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        if BOTH:
            tl.store(d_low + row[:, None] * D + d[None, :], du.to(d_low.dtype.element_ty), mask=mask)
        tl.store(dx + row[:, None] * D + d[None, :], du.to(dx.dtype.element_ty), mask=mask)
    if HAS_WEIGHT:
        tl.store(partials + pid * D + d, dw, mask=d < D)
