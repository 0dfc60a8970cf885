"""Triton kernels of the short causal depthwise convolution.

One tile holds BLOCK_T tokens of BLOCK_D channels. The W taps of a tile are W loads of the same rows, shifted: all but
the first come from the L1 cache. The forward stores nothing for the backward, which recomputes the pre-activation. Its
gradient dz makes one trip through memory: computing dx from x and dy in one kernel would need W shifted copies of dz, each
from W shifted copies of x, and spills.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bounds(cu_seqlens, sequence_of, batch, t, valid, T, PACKED: tl.constexpr):
    """Number, first token and end of the sequence of each token in `t` (positions within the row of tokens)."""
    if PACKED:
        sequence = tl.load(sequence_of + t, mask=valid, other=0)
        start = tl.load(cu_seqlens + sequence, mask=valid, other=0).to(tl.int32)
        end = tl.load(cu_seqlens + sequence + 1, mask=valid, other=0).to(tl.int32)
    else:
        sequence = tl.zeros_like(t) + batch
        start = tl.zeros_like(t)
        end = tl.zeros_like(t) + T
    return sequence, start, end


@triton.jit
def _near_start(t, start, anchor, W: tl.constexpr, PACKED: tl.constexpr):
    """Whether a tap of any token of the tile may reach before its sequence: a scalar, so that others skip the state."""
    if PACKED:
        return tl.min(t - start, axis=0) < W - 1
    return anchor < W - 1


@triton.jit
def _input(
    x, initial, sequence, start, t, anchor, stride_t, d, valid, near_start,
    W: tl.constexpr, D: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Inputs [BLOCK_T, BLOCK_D] in fp32 at positions t of a row whose token `anchor` is at `x`.

    Before `start` they are the initial state, or zero.
    """
    inside = ((t >= start) & valid)[:, None] & (d < D)[None, :]
    value = tl.load(x + (t - anchor)[:, None] * stride_t + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_INITIAL:  # noqa: SIM102 (known when compiling, unlike the next condition)
        if near_start:
            column = t - start + (W - 1)
            before = ((t < start) & (column >= 0) & valid)[:, None] & (d < D)[None, :]
            pointer = initial + (sequence.to(tl.int64) * D)[:, None] * (W - 1) + d[None, :] * (W - 1) + column[:, None]
            value += tl.load(pointer, mask=before, other=0.0).to(tl.float32)
    return value


@triton.jit
def _convolve(
    x, weight, bias, initial, sequence, start, t, anchor, stride_t, d, valid, near_start,
    W: tl.constexpr, D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Pre-activations [BLOCK_T, BLOCK_D] at positions t, fp32."""
    z = tl.zeros([t.shape[0], d.shape[0]], dtype=tl.float32)
    for i in tl.static_range(W):
        tap = tl.load(weight + d * W + i, mask=d < D, other=0.0).to(tl.float32)
        earlier = t - (W - 1) + i
        value = _input(x, initial, sequence, start, earlier, anchor, stride_t, d, valid, near_start, W, D, HAS_INITIAL)
        z += tap[None, :] * value
    if HAS_BIAS:
        z += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    x, weight, bias, initial, y, cu_seqlens, sequence_of, T, stride_b, stride_t,
    W: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y = act(conv(x)). Grid: batch x time tiles x channel tiles, channels fastest."""
    pid = tl.program_id(0)
    blocks_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    blocks_t = tl.cdiv(T, BLOCK_T)
    d = (pid % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    anchor = (pid // blocks_d) % blocks_t * BLOCK_T
    batch = pid // (blocks_d * blocks_t)
    row = tl.arange(0, BLOCK_T)
    t = anchor + row
    valid = t < T
    x += tl.cast(batch, tl.int64) * stride_b + tl.cast(anchor, tl.int64) * stride_t
    y += (tl.cast(batch, tl.int64) * T + anchor) * D
    sequence, start, _ = _bounds(cu_seqlens, sequence_of, batch, t, valid, T, PACKED)
    near = _near_start(t, start, anchor, W, PACKED)
    z = _convolve(
        x, weight, bias, initial, sequence, start, t, anchor, stride_t, d, valid, near, W, D, HAS_BIAS, HAS_INITIAL
    )
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + row[:, None] * D + d[None, :], z.to(y.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["T"])
def weight_gradient_kernel(
    x, weight, bias, initial, dy, dz, partials, cu_seqlens, sequence_of, T, stride_b, stride_t,
    W: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dz [B, T, D] (SILU only), and the gradients of the W taps and the bias summed over the program's TILES time tiles.

    partials [P, W + 1, D]: the host adds them up, which is deterministic, as atomics are not.
    """
    pid = tl.program_id(0)
    blocks_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    spans = tl.cdiv(T, BLOCK_T * TILES)
    d = (pid % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    span = (pid // blocks_d) % spans
    batch = pid // (blocks_d * spans)
    row = tl.arange(0, BLOCK_T)
    tap_row = tl.arange(0, triton.next_power_of_2(W + 1))
    totals = tl.zeros([triton.next_power_of_2(W + 1), BLOCK_D], dtype=tl.float32)
    for tile in range(TILES):
        anchor = (span * TILES + tile) * BLOCK_T
        t = anchor + row
        valid = t < T
        mask = valid[:, None] & (d < D)[None, :]
        x_tile = x + tl.cast(batch, tl.int64) * stride_b + tl.cast(anchor, tl.int64) * stride_t
        at = (tl.cast(batch, tl.int64) * T + anchor) * D + row[:, None] * D + d[None, :]
        sequence, start, _ = _bounds(cu_seqlens, sequence_of, batch, t, valid, T, PACKED)
        near = _near_start(t, start, anchor, W, PACKED)
        gradient = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            z = _convolve(
                x_tile, weight, bias, initial, sequence, start, t, anchor, stride_t, d, valid, near,
                W, D, HAS_BIAS, HAS_INITIAL,
            )  # fmt: skip
            s = tl.sigmoid(z)
            gradient *= s * (1.0 + z * (1.0 - s))
            tl.store(dz + at, gradient.to(dz.dtype.element_ty), mask=mask)
        for j in tl.static_range(W):
            earlier = t - (W - 1) + j
            value = _input(
                x_tile, initial, sequence, start, earlier, anchor, stride_t, d, valid, near, W, D, HAS_INITIAL
            )
            totals += tl.where((tap_row == j)[:, None], tl.sum(gradient * value, axis=0)[None, :], 0.0)
        if HAS_BIAS:
            totals += tl.where((tap_row == W)[:, None], tl.sum(gradient, axis=0)[None, :], 0.0)
    partials += tl.cast(pid // blocks_d, tl.int64) * (W + 1) * D
    tl.store(partials + tap_row[:, None] * D + d[None, :], totals, mask=(tap_row <= W)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["T"])
def input_gradient_kernel(
    weight, dz, dfinal, dx, cu_seqlens, sequence_of, T,
    W: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_DFINAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dx[s] = sum_i weight[i] dz[s + W - 1 - i], within the sequence, and the final state's gradient at its end."""
    pid = tl.program_id(0)
    blocks_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    blocks_t = tl.cdiv(T, BLOCK_T)
    d = (pid % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    anchor = (pid // blocks_d) % blocks_t * BLOCK_T
    batch = pid // (blocks_d * blocks_t)
    row = tl.arange(0, BLOCK_T)
    t = anchor + row
    valid = t < T
    base = (tl.cast(batch, tl.int64) * T + anchor) * D
    sequence, _, end = _bounds(cu_seqlens, sequence_of, batch, t, valid, T, PACKED)
    gradient = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for i in tl.static_range(W):
        later = row + (W - 1 - i)
        mask = (valid & (anchor + later < end))[:, None] & (d < D)[None, :]
        tap = tl.load(weight + d * W + i, mask=d < D, other=0.0).to(tl.float32)
        value = tl.load(dz + base + later[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        gradient += tap[None, :] * value
    if HAS_DFINAL:
        column = t - end + (W - 1)
        if tl.max(tl.where(valid, column, -1), axis=0) >= 0:
            mask = (valid & (column >= 0))[:, None] & (d < D)[None, :]
            pointer = dfinal + (sequence.to(tl.int64) * D)[:, None] * (W - 1) + d[None, :] * (W - 1) + column[:, None]
            gradient += tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    mask = valid[:, None] & (d < D)[None, :]
    tl.store(dx + base + row[:, None] * D + d[None, :], gradient.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def final_state_kernel(
    x, initial, final, cu_seqlens, T, stride_b, stride_t,
    W: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The last W - 1 inputs of each sequence, the initial state counting as inputs before the first.

    Grid: sequences x channel tiles.
    """
    pid = tl.program_id(0)
    blocks_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    d = (pid % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.cast(pid // blocks_d, tl.int64)
    if PACKED:
        begin = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1) - begin).to(tl.int32)
        x += begin * stride_t
    else:
        length = T
        x += n * stride_b
    one = tl.arange(0, 1)
    near = length < W - 1
    for j in tl.static_range(W - 1):
        t = length - (W - 1) + j + one
        x_here = x + tl.cast(length, tl.int64) * stride_t
        value = _input(x_here, initial, n + one, one, t, length, stride_t, d, one == 0, near, W, D, HAS_INITIAL)
        pointer = final + (n * D + d[None, :]) * (W - 1) + j + one[:, None]
        tl.store(pointer, value.to(final.dtype.element_ty), mask=(d < D)[None, :])


@triton.jit(do_not_specialize=["T"])
def initial_state_gradient_kernel(
    weight, dz, dfinal, dinitial, cu_seqlens, T,
    W: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_DFINAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Gradient of the initial state: from the first W - 1 outputs and, in a shorter sequence, from the final state."""
    pid = tl.program_id(0)
    blocks_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    d = (pid % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.cast(pid // blocks_d, tl.int64)
    if PACKED:
        begin = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1) - begin).to(tl.int32)
    else:
        begin = n * T
        length = T
    dz += begin * D
    for j in tl.static_range(W - 1):
        total = tl.zeros([BLOCK_D], dtype=tl.float32)
        for i in tl.static_range(j + 1):
            value = tl.load(dz + (j - i) * D + d, mask=(d < D) & (j - i < length), other=0.0).to(tl.float32)
            total += tl.load(weight + d * W + i, mask=d < D, other=0.0).to(tl.float32) * value
        if HAS_DFINAL:
            column = j - length
            pointer = dfinal + (n * D + d) * (W - 1) + column
            total += tl.load(pointer, mask=(d < D) & (column >= 0), other=0.0).to(tl.float32)
        tl.store(dinitial + (n * D + d) * (W - 1) + j, total.to(dinitial.dtype.element_ty), mask=d < D)
