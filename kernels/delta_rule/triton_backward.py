"""Gradients inside one chunk, for no gate or one gate a head, once the scans have left their tensors.

With dA, M, X and dV from triton_squares.py, per row the sums over K and V:

    Y    = M K - exp(G) X S^T                      (gradient of k through beta's row, without beta)
    dQ   = scale exp(G) dO S^T + dA K
    dK   = exp(G_end - G) V_new dS^T + dA^T Q + beta Y + (beta M)^T K
    dbeta = <X, V> + <K, Y>
    dG   = <Q, dQ> - <K, dK> + 2 beta <K, Y>;   the chunk's last row also gets
           <K, exp(G_end - G) V_new dS^T> summed over the chunk and exp(G_end) <S, dS>
    dg   = sum of dG over this and later rows of the chunk
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.common.chunks import locate_chunk
from kernels.common.tiles import die_order_rows, load_tile_masked


@triton.jit(do_not_specialize=["T"])
def gradients_kernel(
    q_in,  # [slots, H, BT, BK], of unit length if NORMALIZE
    k_in,
    do,  # [total, HV, V]
    rates,  # [slots, HV, BT] fp32: beta
    cumulative,  # [slots, HV, BT] fp32, log2 units, if GATED
    states,  # [slots, HV, V, BK]: S' at the start of each chunk
    d_states,  # [slots, HV, V, BK]: gradient of S' at the end of each chunk
    v_new,  # [slots, HV, V, BT]
    d_error,  # [slots, HV, V, BT]
    d_scores,  # [slots, HV, BT, BT]: dA
    d_lower,  # [slots, HV, BT, BT]: M
    dbeta_v,  # [total, HV] fp32: <X, V>
    q_factor,  # [slots, H, BT] fp32, if NORMALIZE
    k_factor,
    dq,  # [total, HV, K] out
    dk,  # [total, HV, K] out
    dbeta,  # [total, HV] out
    dg,  # [total, HV] out, if GATED
    cu_seqlens,
    indices,
    scale,
    T,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BR: tl.constexpr,  # tokens at a time
    GATED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    DIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    hv, slot = die_order_rows(HV // H, DIES)
    sequence, chunk, begin, length = locate_chunk(slot, cu_seqlens, indices, T, BT, PACKED)
    if sequence < 0:
        return
    h = hv // (HV // H)
    left = length - chunk * BT
    first = begin + chunk * BT
    by_head = tl.cast(slot, tl.int64) * HV + hv
    by_key_head = tl.cast(slot, tl.int64) * H + h
    row = tl.arange(0, BT)
    live = row < left
    channel = tl.arange(0, BK)
    b_beta = tl.load(rates + by_head * BT + row)
    within = tl.arange(0, BV)
    at_v = row[:, None] * (HV * V) + within[None, :]
    at_s = within[:, None] * BK + channel[None, :]
    at_new = within[:, None] * BT + row[None, :]
    at_k = row[:, None] * BK + channel[None, :]

    b_dq = tl.zeros([BT, BK], dtype=tl.float32)
    b_dk = tl.zeros([BT, BK], dtype=tl.float32)
    b_y = tl.zeros([BT, BK], dtype=tl.float32)
    overlap = 0.0
    for start in range(0, V, BV):
        inside = within < V - start
        mask_v = live[:, None] & inside[None, :]
        row_v = by_head * V + start
        b_do = load_tile_masked(do, first, hv * V + start, at_v, mask_v, HV * V, DESCRIPTOR)
        b_new = load_tile_masked(v_new, row_v, 0, at_new, inside[:, None], BT, DESCRIPTOR)
        b_x = load_tile_masked(d_error, row_v, 0, at_new, inside[:, None], BT, DESCRIPTOR)
        b_s = load_tile_masked(states, row_v, 0, at_s, inside[:, None], BK, DESCRIPTOR)
        b_ds = load_tile_masked(d_states, row_v, 0, at_s, inside[:, None], BK, DESCRIPTOR)
        b_dq = tl.dot(b_do, b_s, acc=b_dq, input_precision=PRECISION)
        b_dk = tl.dot(tl.trans(b_new), b_ds, acc=b_dk, input_precision=PRECISION)
        b_y = tl.dot(tl.trans(b_x), b_s, acc=b_y, input_precision=PRECISION)
        if GATED:
            overlap += tl.sum(tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), axis=1), axis=0)

    k_in += by_key_head * BT * BK
    q_in += by_key_head * BT * BK
    wide_k = tl.load(k_in + at_k).to(tl.float32)
    if GATED:
        b_g = tl.load(cumulative + by_head * BT + row)
        end = tl.load(cumulative + by_head * BT + BT - 1)
        from_start = tl.exp2(b_g)
        b_dq *= from_start[:, None]
        b_y *= from_start[:, None]
        b_dk *= tl.exp2(end - b_g)[:, None]
        along_end = tl.sum(b_dk * wide_k, axis=1)
    b_y = -b_y
    b_dq *= scale
    # The tokens of the chunk some at a time: all at once, every operand would be held in registers together. One product a
    # loop for each sum: two that follow each other make Triton spread the warps over the rows alone, of which there are
    # too few for eight, so that half of them would repeat the others' work.
    d_lower += by_head * BT * BT
    d_scores += by_head * BT * BT
    for start in range(0, BT, BR):
        other = start + tl.arange(0, BR)
        at_other = other[:, None] * BK + channel[None, :]
        at_lower = row[:, None] * BT + other[None, :]
        at_upper = row[:, None] + other[None, :] * BT
        b_k = tl.load(k_in + at_other)
        b_y = tl.dot(tl.load(d_lower + at_lower), b_k, acc=b_y, input_precision=PRECISION)
        b_dq = tl.dot(tl.load(d_scores + at_lower), b_k, acc=b_dq, input_precision=PRECISION)
        b_dk = tl.dot(tl.load(d_scores + at_upper), tl.load(q_in + at_other), acc=b_dk, input_precision=PRECISION)
    for start in range(0, BT, BR):
        other = start + tl.arange(0, BR)
        at_upper = row[:, None] + other[None, :] * BT
        b_k = tl.load(k_in + other[:, None] * BK + channel[None, :])
        tile = tl.load(d_lower + at_upper).to(tl.float32) * tl.load(rates + by_head * BT + other)[None, :]
        b_dk = tl.dot(tile.to(b_k.dtype), b_k, acc=b_dk, input_precision=PRECISION)
    b_dk += b_beta[:, None] * b_y

    # k is done with before q is read, so that less is held at a time.
    mask_k = live[:, None] & (channel < K)[None, :]
    at_out = (first * HV + hv) * K + row[:, None] * (HV * K) + channel[None, :]
    wide_k = tl.load(k_in + at_k).to(tl.float32)
    along_y = tl.sum(wide_k * b_y, axis=1)
    along_k = tl.sum(wide_k * b_dk, axis=1)
    b_dbeta = tl.load(dbeta_v + first * HV + hv + row * HV, mask=live, other=0.0)
    tl.store(dbeta + first * HV + hv + row * HV, (b_dbeta + along_y).to(dbeta.dtype.element_ty), mask=live)
    if NORMALIZE:
        # y = x r with r = (sum x^2 + eps)^-1/2:  dx = r (dy - y <y, dy>), exact with eps.
        r_k = tl.load(k_factor + by_key_head * BT + row)
        b_dk = (b_dk - wide_k * along_k[:, None]) * r_k[:, None]
    tl.store(dk + at_out, b_dk.to(dk.dtype.element_ty), mask=mask_k)
    wide_q = tl.load(q_in + at_k).to(tl.float32)
    along_q = tl.sum(wide_q * b_dq, axis=1)
    if NORMALIZE:
        r_q = tl.load(q_factor + by_key_head * BT + row)
        b_dq = (b_dq - wide_q * along_q[:, None]) * r_q[:, None]
    tl.store(dq + at_out, b_dq.to(dq.dtype.element_ty), mask=mask_k)
    if GATED:
        d_g = along_q - along_k + 2.0 * b_beta * along_y
        # What G_end gets is the same for all rows. A sum of all of along_end, written with two cumulative ones: Blackwell's
        # compiler (Triton 3.7) fails on the sum of a vector here.
        d_g = tl.cumsum(d_g + along_end, axis=0, reverse=True) + tl.cumsum(along_end, axis=0) - along_end
        d_g += tl.exp2(end) * overlap
        tl.store(dg + first * HV + hv + row * HV, d_g.to(dg.dtype.element_ty), mask=live)
