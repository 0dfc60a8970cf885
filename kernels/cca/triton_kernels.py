"""Triton kernels of CCA's queries and keys. One program has BLOCK_T tokens of one head.

Each makes the one convolution of `kernels.cca.taps`: products of tiles of z (or of a gradient), shifted by 0 ... R tokens, with a
tap. The shifted tiles are loads of the same rows: all but the first come from a cache. Tokens are counted within their row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sequence(cu_seqlens, sequence_of, batch, t, T, PACKED: tl.constexpr):
    """Number, first token and end of the sequence of each token in t."""
    if PACKED:
        number = tl.load(sequence_of + t, mask=t < T, other=0)
        start = tl.load(cu_seqlens + number, mask=t < T, other=0).to(tl.int32)
        end = tl.load(cu_seqlens + number + 1, mask=t < T, other=0).to(tl.int32)
    else:
        number = tl.zeros_like(t) + batch
        start = tl.zeros_like(t)
        end = tl.zeros_like(t) + T
    return number, start, end


@triton.jit
def _place(T, HEADS: tl.constexpr, BLOCK_T: tl.constexpr):
    """(head, first token, row) of this program. Heads come first: together they read whole rows of z."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(T, BLOCK_T)
    return pid % HEADS, pid // HEADS % tiles * BLOCK_T, tl.cast(pid // HEADS // tiles, tl.int64)


@triton.jit
def _earlier(
    z, state, number, start, t, anchor, ago, stride_t, column, inside, C: tl.constexpr, R: tl.constexpr,
    HAS_STATE: tl.constexpr,
):  # fmt: skip
    """Columns [BLOCK_T, .] of `ago` tokens ago. z: token `anchor` of the row. inside: of the columns."""
    seen = t - ago
    there = seen >= start
    rows = (seen - anchor)[:, None] * stride_t
    value = tl.load(z + rows + column[None, :], mask=there[:, None] & inside, other=0.0)
    if HAS_STATE:
        slot = seen - start + R
        before = state + (number.to(tl.int64) * R + slot)[:, None] * C + column[None, :]
        value += tl.load(before, mask=(~there & (slot >= 0))[:, None] & inside, other=0.0).to(value.dtype)
    return value


@triton.jit
def _convolved(
    z, state, taps, offset, number, start, t, T, anchor, stride_t, head,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_STATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head [BLOCK_T, BLOCK_D] before the norm, fp32: the convolution and the query-key mean."""
    G: tl.constexpr = H // HKV
    C: tl.constexpr = (H + HKV) * D
    PARTS: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    o = tl.arange(0, BLOCK_D)
    i = tl.arange(0, BLOCK_K)
    x = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for step in range((R + 1) * PARTS):
        ago = step // PARTS
        c = step % PARTS * BLOCK_K + i
        inside = (t < T)[:, None] & (c < D)[None, :]
        value = _earlier(
            z, state, number, start, t, anchor, ago, stride_t, head * D + c, inside, C, R, HAS_STATE
        )  # fmt: skip
        tap = taps + (head * (R + 1) + ago) * D * D + c[:, None] * D + o[None, :]
        weight = tl.load(tap, mask=(c < D)[:, None] & (o < D)[None, :], other=0.0)
        x = tl.dot(value, weight, x, input_precision=PRECISION)
    x += tl.load(offset + head * D + o, mask=o < D, other=0.0)[None, :]
    mask = (t < T)[:, None] & (o < D)[None, :]
    here = z + (t - anchor)[:, None] * stride_t + o[None, :]
    x += 0.5 * tl.load(here + head * D, mask=mask, other=0.0).to(tl.float32)
    if head < H:
        x += 0.5 * tl.load(here + (H + head // G) * D, mask=mask, other=0.0).to(tl.float32)
    else:
        for n in range(G):
            x += (0.5 / G) * tl.load(here + ((head - H) * G + n) * D, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    z, state, taps, offset, factor, q, k, cu_seqlens, sequence_of, T, stride_b, stride_t, eps,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_STATE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q [B, T, H, D] of length 1, k [B, T, HKV, D] of length |factor|. Grid: rows x time tiles x heads."""
    head, anchor, batch = _place(T, H + HKV, BLOCK_T)
    row = tl.arange(0, BLOCK_T)
    t = anchor + row
    number, start, _ = _sequence(cu_seqlens, sequence_of, batch, t, T, PACKED)
    z += batch * stride_b + tl.cast(anchor, tl.int64) * stride_t
    x = _convolved(
        z, state, taps, offset, number, start, t, T, anchor, stride_t, head,
        H, HKV, D, R, BLOCK_T, BLOCK_D, BLOCK_K, HAS_STATE, PRECISION,
    )  # fmt: skip
    o = tl.arange(0, BLOCK_D)
    mask = (t < T)[:, None] & (o < D)[None, :]
    y = x * tl.rsqrt(tl.sum(x * x, axis=1) + eps)[:, None]
    first = batch * T + anchor
    if head < H:
        at = q + (first * H + head) * D + row[:, None] * (H * D) + o[None, :]
        tl.store(at, y.to(q.dtype.element_ty), mask=mask)
    else:
        y *= tl.load(factor + head - H)
        at = k + (first * HKV + head - H) * D + row[:, None] * (HKV * D) + o[None, :]
        tl.store(at, y.to(k.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def norm_gradient_kernel(
    z, state, taps, offset, factor, dq, dk, ds, dfactor, cu_seqlens, sequence_of, T, stride_b, stride_t, eps,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_STATE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ds [B T, C]: the gradient of what is normalised, which is made again. Grid: as the forward.

    dfactor [row tiles, HKV]: each program's part, which the host adds up: deterministic, as atomics are not.
    """
    head, anchor, batch = _place(T, H + HKV, BLOCK_T)
    row = tl.arange(0, BLOCK_T)
    t = anchor + row
    number, start, _ = _sequence(cu_seqlens, sequence_of, batch, t, T, PACKED)
    z += batch * stride_b + tl.cast(anchor, tl.int64) * stride_t
    unit = _convolved(
        z, state, taps, offset, number, start, t, T, anchor, stride_t, head,
        H, HKV, D, R, BLOCK_T, BLOCK_D, BLOCK_K, HAS_STATE, PRECISION,
    )  # fmt: skip
    o = tl.arange(0, BLOCK_D)
    mask = (t < T)[:, None] & (o < D)[None, :]
    scale = tl.rsqrt(tl.sum(unit * unit, axis=1) + eps)
    unit *= scale[:, None]
    first = batch * T + anchor
    if head < H:
        at = dq + (first * H + head) * D + row[:, None] * (H * D) + o[None, :]
        dy = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        along = tl.sum(dy * unit, axis=1)
    else:
        at = dk + (first * HKV + head - H) * D + row[:, None] * (HKV * D) + o[None, :]
        dy = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        along = tl.sum(dy * unit, axis=1)
        tl.store(dfactor + tl.program_id(0) // (H + HKV) * HKV + head - H, tl.sum(along, axis=0))
        f = tl.load(factor + head - H)
        dy *= f
        along *= f
    gradient = (dy - unit * along[:, None]) * scale[:, None]
    to = ds + (first * (H + HKV) + head) * D + row[:, None] * ((H + HKV) * D) + o[None, :]
    tl.store(to, gradient.to(ds.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "TILES"])
def tap_gradient_kernel(
    z, state, ds, dtaps, doffset, cu_seqlens, sequence_of, T, TILES, stride_b, stride_t,
    HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_STATE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dtaps [spans, J, R + 1, D, D] and doffset [spans, C], each over TILES time tiles of one row.

    Grid: spans x heads x shifts x parts of a tap's rows: neighbours read the same gradients.
    """
    C: tl.constexpr = HEADS * D
    PARTS: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    part = pid % PARTS
    ago = pid // PARTS % (R + 1)
    head = pid // (PARTS * (R + 1)) % HEADS
    span = pid // (PARTS * (R + 1) * HEADS)
    spans = tl.cdiv(T, BLOCK_T * TILES)
    batch = tl.cast(span // spans, tl.int64)
    row = tl.arange(0, BLOCK_T)
    o = tl.arange(0, BLOCK_D)
    c = part * BLOCK_K + tl.arange(0, BLOCK_K)
    z += batch * stride_b
    ds += batch * T * C + head * D
    total = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    bias = tl.zeros([BLOCK_D], dtype=tl.float32)
    for tile in range(TILES):
        anchor = (span % spans * TILES + tile) * BLOCK_T
        t = anchor + row
        number, start, _ = _sequence(cu_seqlens, sequence_of, batch, t, T, PACKED)
        here = z + tl.cast(anchor, tl.int64) * stride_t
        inside = (t < T)[:, None] & (c < D)[None, :]
        value = _earlier(
            here, state, number, start, t, anchor, ago, stride_t, head * D + c, inside, C, R, HAS_STATE
        )  # fmt: skip
        at = ds + tl.cast(anchor, tl.int64) * C + row[:, None] * C + o[None, :]
        gradient = tl.load(at, mask=(t < T)[:, None] & (o < D)[None, :], other=0.0)
        total = tl.dot(tl.trans(value), gradient, total, input_precision=PRECISION)
        if (part == 0) & (ago == 0):
            bias += tl.sum(gradient.to(tl.float32), axis=0)
    to = dtaps + ((tl.cast(span, tl.int64) * HEADS + head) * (R + 1) + ago) * D * D + c[:, None] * D + o[None, :]
    tl.store(to, total, mask=(c < D)[:, None] & (o < D)[None, :])
    if (part == 0) & (ago == 0):
        tl.store(doffset + tl.cast(span, tl.int64) * C + head * D + o, bias, mask=o < D)


@triton.jit(do_not_specialize=["T"])
def input_gradient_kernel(
    taps, ds, dz, cu_seqlens, sequence_of, T,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dz [B T, C]: what ds gives through the taps, within the sequence, and through the query-key mean. Grid: as the forward."""
    G: tl.constexpr = H // HKV
    C: tl.constexpr = (H + HKV) * D
    PARTS: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    head, anchor, batch = _place(T, H + HKV, BLOCK_T)
    row = tl.arange(0, BLOCK_T)
    t = anchor + row
    _, _, end = _sequence(cu_seqlens, sequence_of, batch, t, T, PACKED)
    base = (batch * T + anchor) * C
    c = tl.arange(0, BLOCK_D)
    i = tl.arange(0, BLOCK_K)
    dx = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for step in range((R + 1) * PARTS):
        later = step // PARTS
        o = step % PARTS * BLOCK_K + i
        mask = (t + later < end)[:, None] & (o < D)[None, :]
        value = tl.load(ds + base + head * D + (row + later)[:, None] * C + o[None, :], mask=mask, other=0.0)
        tap = taps + (head * (R + 1) + later) * D * D + c[:, None] * D + o[None, :]
        weight = tl.load(tap, mask=(c < D)[:, None] & (o < D)[None, :], other=0.0)
        dx = tl.dot(value, tl.trans(weight), dx, input_precision=PRECISION)
    mask = (t < T)[:, None] & (c < D)[None, :]
    here = ds + base + row[:, None] * C + c[None, :]
    dx += 0.5 * tl.load(here + head * D, mask=mask, other=0.0).to(tl.float32)
    if head < H:
        dx += (0.5 / G) * tl.load(here + (H + head // G) * D, mask=mask, other=0.0).to(tl.float32)
    else:
        for n in range(G):
            dx += 0.5 * tl.load(here + ((head - H) * G + n) * D, mask=mask, other=0.0).to(tl.float32)
    tl.store(dz + base + head * D + row[:, None] * C + c[None, :], dx.to(dz.dtype.element_ty), mask=mask)
