"""The two square tiles of a chunk that the gradients of its keys and queries need, for every kind of gate.

The triangular solve is differentiated implicitly. With E = beta (V - exp(G) K S) and (I + L) V_new = E:

    X = dE = (I + L)^-T dV_new  (from the backward scan);   dL = -stril(X V_new^T)

so neither the inverse nor W and U appear. With D_ij = exp(G_i - G_j), left out (to be put in by the reader) where the
gate has one a channel:

    dA = scale tril(dO V_new^T) D;   M = stril(dL) D;   dV = beta X;   dbeta = <X, V> + ...

A kernel of its own, because these accumulators beside those of dQ and dK overflow the registers, and because a reader
may take a tile transposed from memory, where transposing an accumulator goes wrong in some versions of Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.common.chunks import locate_chunk
from kernels.common.tiles import load_tile_masked


@triton.jit(do_not_specialize=["T"])
def squares_kernel(
    v,  # [total, HV, V]
    do,  # [total, HV, V]
    rates,  # [slots, HV, BT] fp32: beta
    cumulative,  # GATE 1: [slots, HV, BT] fp32, log2 units
    v_new,  # [slots, HV, V, BT]
    d_error,  # [slots, HV, V, BT]
    d_scores,  # [slots, HV, BT, BT] out: dA
    d_lower,  # [slots, HV, BT, BT] out: M
    dv,  # [total, HV, V] out
    dbeta,  # [total, HV] fp32 out: <X, V>, the first part of the gradient
    cu_seqlens,
    indices,
    scale,
    T,
    HV: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    GATE: tl.constexpr,
    PACKED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    hv = tl.program_id(0)
    slot = tl.program_id(1)
    sequence, chunk, begin, length = locate_chunk(slot, cu_seqlens, indices, T, BT, PACKED)
    if sequence < 0:
        return
    first = begin + chunk * BT
    by_head = tl.cast(slot, tl.int64) * HV + hv
    row = tl.arange(0, BT)
    live = row < length - chunk * BT
    within = tl.arange(0, BV)
    at_v = row[:, None] * (HV * V) + within[None, :]
    at_new = within[:, None] * BT + row[None, :]
    b_beta = tl.load(rates + by_head * BT + row)

    b_scores = tl.zeros([BT, BT], dtype=tl.float32)
    b_lower = tl.zeros([BT, BT], dtype=tl.float32)
    b_dbeta = tl.zeros([BT], dtype=tl.float32)
    for start in range(0, V, BV):
        inside = within < V - start
        mask_v = live[:, None] & inside[None, :]
        b_do = load_tile_masked(do, first, hv * V + start, at_v, mask_v, HV * V, DESCRIPTOR)
        b_v = load_tile_masked(v, first, hv * V + start, at_v, mask_v, HV * V, DESCRIPTOR)
        b_new = load_tile_masked(v_new, by_head * V + start, 0, at_new, inside[:, None], BT, DESCRIPTOR)
        b_x = load_tile_masked(d_error, by_head * V + start, 0, at_new, inside[:, None], BT, DESCRIPTOR)
        b_scores = tl.dot(b_do, b_new, acc=b_scores, input_precision=PRECISION)
        b_lower = tl.dot(tl.trans(b_x), b_new, acc=b_lower, input_precision=PRECISION)
        wide_x = tl.trans(b_x).to(tl.float32)
        b_dbeta += tl.sum(wide_x * b_v.to(tl.float32), axis=1)
        to = dv + first * (HV * V) + hv * V + start + at_v
        tl.store(to, (wide_x * b_beta[:, None]).to(dv.dtype.element_ty), mask=mask_v)
    at_t = by_head * BT * BT + row[:, None] * BT + row[None, :]
    lower = row[:, None] > row[None, :]
    if GATE == 1:
        # The exponent is masked, not the result: above the diagonal it is positive and may overflow.
        gate = tl.load(cumulative + by_head * BT + row)
        decay = tl.exp2(tl.where(lower, gate[:, None] - gate[None, :], 0.0))
        b_scores *= decay
        b_lower *= decay
    # Rows beyond the sequence may have been read from the next one.
    b_scores = tl.where((row[:, None] >= row[None, :]) & live[:, None], b_scores * scale, 0.0)
    b_lower = tl.where(lower, -b_lower, 0.0)
    tl.store(d_scores + at_t, b_scores.to(d_scores.dtype.element_ty))
    tl.store(d_lower + at_t, b_lower.to(d_lower.dtype.element_ty))
    tl.store(dbeta + first * HV + hv + row * HV, b_dbeta, mask=live)
