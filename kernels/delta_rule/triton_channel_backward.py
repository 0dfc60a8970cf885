"""Gradients inside one chunk with a gate a channel (KDA): triton_backward.py's formulas with dyadic references.

With D_ijk = exp(G_ik - G_jk), dA = scale tril(dO V_new^T) and M = -stril(X V_new^T), per channel:

    Y  = Σ_j M_ij k_j D_ij - exp(G) X S^T
    dQ = scale exp(G) dO S^T + Σ_j dA_ij k_j D_ij
    dK = exp(G_end - G) V_new dS^T + Σ_i (dA_ij q_i + beta_i M_ij k_i) D_ij + beta Y
    dG = Q dQ - K dK + 2 beta K Y, and for the last row Σ K exp(G_end - G) V_new dS^T + exp(G_end) Σ_V S dS

dA and M come from triton_squares.py, without their decays; the kernel here serves a block of channels at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.common.chunks import locate_chunk
from kernels.common.tiles import die_order_rows, load_tile_masked
from kernels.delta_rule.triton_channel import level_decay, level_pairs


@triton.jit(do_not_specialize=["T"])
def channel_gradients_kernel(
    q_unit,  # [slots, H, BT, BK]
    k_unit,
    do,  # [total, HV, V]
    rates,  # [slots, HV, BT] fp32
    cumulative,  # [slots, HV, BT, BK] fp32
    states,  # [slots, HV, V, BK]
    d_states,  # [slots, HV, V, BK]
    v_new,  # [slots, HV, V, BT]
    d_error,  # [slots, HV, V, BT]
    d_scores,  # [slots, HV, BT, BT]
    d_lower,  # [slots, HV, BT, BT]
    dq,  # [total, HV, K] out
    dk,  # [total, HV, K] out
    dbeta,  # [BK / BC, total, HV] fp32 out: <K, Y> of each block of channels
    dg,  # [total, HV, K] out
    cu_seqlens,
    indices,
    scale,
    T,
    total,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    BV: tl.constexpr,
    LEVELS: tl.constexpr,  # log2(BT)
    PACKED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    DIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Programs of one chunk and head are neighbours: they read the same tiles.
    column, slot = die_order_rows(BK // BC * (HV // H), DIES)
    hv = column // (BK // BC)
    i_c = column % (BK // BC)
    sequence, chunk, begin, length = locate_chunk(slot, cu_seqlens, indices, T, BT, PACKED)
    if sequence < 0:
        return
    h = hv // (HV // H)
    first = begin + chunk * BT
    by_key_head = tl.cast(slot, tl.int64) * H + h
    by_head = tl.cast(slot, tl.int64) * HV + hv
    row = tl.arange(0, BT)
    live = row < length - chunk * BT
    column = i_c * BC + tl.arange(0, BC)
    value = tl.arange(0, BV)
    at_v = row[:, None] * (HV * V) + value[None, :]
    at_s = value[:, None] * BK + tl.arange(0, BC)[None, :]
    at_new = value[:, None] * BT + row[None, :]
    at_k = row[:, None] * BK + column[None, :]
    b_beta = tl.load(rates + by_head * BT + row)

    b_dq = tl.zeros([BT, BC], dtype=tl.float32)
    b_dk = tl.zeros([BT, BC], dtype=tl.float32)
    b_y = tl.zeros([BT, BC], dtype=tl.float32)
    at_end = tl.zeros([BC], dtype=tl.float32)
    for start in range(0, V, BV):
        inside = value < V - start
        mask_v = live[:, None] & inside[None, :]
        row_v = by_head * V + start
        b_do = load_tile_masked(do, first, hv * V + start, at_v, mask_v, HV * V, DESCRIPTOR)
        b_new = load_tile_masked(v_new, row_v, 0, at_new, inside[:, None], BT, DESCRIPTOR)
        b_x = load_tile_masked(d_error, row_v, 0, at_new, inside[:, None], BT, DESCRIPTOR)
        b_s = load_tile_masked(states, row_v, i_c * BC, at_s, inside[:, None], BK, DESCRIPTOR)
        b_ds = load_tile_masked(d_states, row_v, i_c * BC, at_s, inside[:, None], BK, DESCRIPTOR)
        b_dq = tl.dot(b_do, b_s, acc=b_dq, input_precision=PRECISION)
        b_dk = tl.dot(tl.trans(b_new), b_ds, acc=b_dk, input_precision=PRECISION)
        b_y = tl.dot(tl.trans(b_x), b_s, acc=b_y, input_precision=PRECISION)
        at_end += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), axis=0)

    b_k = tl.load(k_unit + by_key_head * BT * BK + at_k)
    b_q = tl.load(q_unit + by_key_head * BT * BK + at_k)
    cumulative += by_head * BT * BK
    b_g = tl.load(cumulative + at_k)
    end = tl.load(cumulative + (BT - 1) * BK + column)
    wide_k = b_k.to(tl.float32)
    wide_q = b_q.to(tl.float32)
    from_start = tl.exp2(b_g)
    b_dq *= from_start * scale
    b_y *= -from_start
    b_dk *= tl.exp2(end[None, :] - b_g)
    at_end = tl.exp2(end) * at_end + tl.sum(b_dk * wide_k, axis=0)

    # dA and M are read afresh at each level: they stay in the nearest cache, where registers could not hold them.
    at_t = by_head * BT * BT + row[:, None] * BT + row[None, :]
    for level in range(LEVELS):
        s = BT >> (level + 1)
        decay = level_decay(cumulative, b_g, row, column, s, BK)
        pairs = level_pairs(row[:, None], row[None, :], s)
        near = (wide_k * decay).to(b_k.dtype)
        tile = tl.load(d_lower + at_t, mask=pairs, other=0.0)
        b_y += decay * tl.dot(tile, near, input_precision=PRECISION)
        near_beta = (wide_k * b_beta[:, None] * decay).to(b_k.dtype)
        part = tl.dot(tl.trans(tile), near_beta, input_precision=PRECISION)
        tile = tl.load(d_scores + at_t, mask=pairs, other=0.0)
        b_dq += decay * tl.dot(tile, near, input_precision=PRECISION)
        near = (wide_q * decay).to(b_k.dtype)
        part = tl.dot(tl.trans(tile), near, acc=part, input_precision=PRECISION)
        b_dk += decay * part
    own = tl.load(d_scores + by_head * BT * BT + row * (BT + 1)).to(tl.float32)
    b_dq += own[:, None] * wide_k
    b_dk += own[:, None] * wide_q + b_beta[:, None] * b_y

    d_g = wide_q * b_dq - wide_k * b_dk + 2.0 * b_beta[:, None] * (wide_k * b_y)
    d_g = tl.cumsum(d_g, axis=0, reverse=True) + at_end[None, :]
    mask = live[:, None] & (column < K)[None, :]
    at_out = (first * HV + hv) * K + row[:, None] * (HV * K) + column[None, :]
    tl.store(dg + at_out, d_g.to(dg.dtype.element_ty), mask=mask)
    tl.store(dq + at_out, b_dq.to(dq.dtype.element_ty), mask=mask)
    tl.store(dk + at_out, b_dk.to(dk.dtype.element_ty), mask=mask)
    to = dbeta + (tl.cast(i_c, tl.int64) * total + first) * HV + hv + row * HV
    tl.store(to, tl.sum(wide_k * b_y, axis=1), mask=live)
