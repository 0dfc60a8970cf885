"""Gradients inside one chunk, for no gate or one gate a head, once the scans have left their tensors.

The triangular solve is differentiated implicitly. With E = beta (V - exp(G) K S) and (I + L) V_new = E:

    X = dE = (I + L)^-T dV_new  (from the backward scan);   dL = -stril(X V_new^T)

so neither the inverse nor W and U appear here. With D_ij = exp(G_i - G_j), dA = tril(dO V_new^T) D, M = stril(dL) D,
and per row the sums over K and V:

    Y    = M K - exp(G) X S^T                      (gradient of k through beta's row, without beta)
    dQ   = scale (exp(G) dO S^T + dA K)
    dK   = exp(G_end - G) V_new dS^T + scale dA^T Q + beta Y + (beta M)^T K
    dV   = beta X
    dbeta = <X, V> + <K, Y>
    dG   = <Q, dQ> - <K, dK> + 2 beta <K, Y>;   the chunk's last row also gets
           <K, exp(G_end - G) V_new dS^T> summed over the chunk and exp(G_end) <S, dS>
    dg   = sum of dG over this and later rows of the chunk
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.common.chunks import locate_chunk
from kernels.common.tiles import load_tile, load_tile_masked


@triton.jit(do_not_specialize=["T"])
def gradients_kernel(
    q_in,  # [slots, H, BT, BK], of unit length if NORMALIZE
    k_in,
    v,  # [total, HV, V]
    do,  # [total, HV, V]
    rates,  # [slots, HV, BT] fp32: beta
    cumulative,  # [slots, HV, BT] fp32, log2 units, if GATED
    states,  # [slots, HV, V, BK]: S' at the start of each chunk
    d_states,  # [slots, HV, V, BK]: gradient of S' at the end of each chunk
    v_new,  # [slots, HV, V, BT]
    d_error,  # [slots, HV, V, BT]
    q_factor,  # [slots, H, BT] fp32, if NORMALIZE
    k_factor,
    dq,  # [total, HV, K] out
    dk,  # [total, HV, K] out
    dv,  # [total, HV, V] out
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
    GATED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    hv = tl.program_id(0)
    slot = tl.program_id(1)
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

    # First the square tiles, so that they shrink to the operands' dtype before the wide accumulators need registers.
    # Each is made twice, once transposed: transposing a product is what some versions of Triton got wrong.
    d_scores = tl.zeros([BT, BT], dtype=tl.float32)
    d_scores_t = tl.zeros([BT, BT], dtype=tl.float32)
    d_lower = tl.zeros([BT, BT], dtype=tl.float32)
    d_lower_t = tl.zeros([BT, BT], dtype=tl.float32)
    b_dbeta = tl.zeros([BT], dtype=tl.float32)
    for start in range(0, V, BV):
        inside = within < V - start
        mask_v = live[:, None] & inside[None, :]
        b_do = load_tile_masked(do, first, hv * V + start, at_v, mask_v, HV * V, DESCRIPTOR)
        b_v = load_tile_masked(v, first, hv * V + start, at_v, mask_v, HV * V, DESCRIPTOR)
        b_new = load_tile_masked(v_new, by_head * V + start, 0, at_new, inside[:, None], BT, DESCRIPTOR)
        b_x = load_tile_masked(d_error, by_head * V + start, 0, at_new, inside[:, None], BT, DESCRIPTOR)
        d_scores = tl.dot(b_do, b_new, acc=d_scores, input_precision=PRECISION)
        d_scores_t = tl.dot(tl.trans(b_new), tl.trans(b_do), acc=d_scores_t, input_precision=PRECISION)
        d_lower = tl.dot(tl.trans(b_x), b_new, acc=d_lower, input_precision=PRECISION)
        d_lower_t = tl.dot(tl.trans(b_new), b_x, acc=d_lower_t, input_precision=PRECISION)
        wide_x = tl.trans(b_x).to(tl.float32)
        b_dbeta += tl.sum(wide_x * b_v.to(tl.float32), axis=1)
        to = dv + first * (HV * V) + hv * V + start + at_v
        tl.store(to, (wide_x * b_beta[:, None]).to(dv.dtype.element_ty), mask=mask_v)

    lower = row[:, None] > row[None, :]
    upper = row[:, None] < row[None, :]
    if GATED:
        b_g = tl.load(cumulative + by_head * BT + row)
        end = tl.load(cumulative + by_head * BT + BT - 1)
        decay = tl.exp2(tl.where(lower, b_g[:, None] - b_g[None, :], 0.0))
        d_scores *= decay
        d_lower *= decay
        decay_t = tl.exp2(tl.where(upper, b_g[None, :] - b_g[:, None], 0.0))
        d_scores_t *= decay_t
        d_lower_t *= decay_t
    kind = k_in.dtype if DESCRIPTOR else k_in.dtype.element_ty
    # dL = -X V_new^T carries a minus sign, which is put in here.
    d_lower = tl.where(lower, -d_lower, 0.0).to(kind)
    d_lower_t = tl.where(upper, d_lower_t * (-b_beta)[None, :], 0.0).to(kind)
    d_scores = tl.where(upper, 0.0, d_scores * scale).to(kind)
    d_scores_t = tl.where(lower, 0.0, d_scores_t * scale).to(kind)

    b_dq = tl.zeros([BT, BK], dtype=tl.float32)
    b_dk = tl.zeros([BT, BK], dtype=tl.float32)
    b_y = tl.zeros([BT, BK], dtype=tl.float32)
    overlap = tl.zeros([BV], dtype=tl.float32)
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
            overlap += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), axis=1)

    b_k = load_tile(k_in, by_key_head * BT, 0, at_k, BK, DESCRIPTOR)
    b_q = load_tile(q_in, by_key_head * BT, 0, at_k, BK, DESCRIPTOR)
    wide_k = b_k.to(tl.float32)
    if GATED:
        from_start = tl.exp2(b_g)
        b_dq *= from_start[:, None]
        b_y *= from_start[:, None]
        b_dk *= tl.exp2(end - b_g)[:, None]
        along_end = tl.sum(b_dk * wide_k, axis=1)
    b_y = tl.dot(d_lower, b_k, acc=-b_y, input_precision=PRECISION)
    b_dq = tl.dot(d_scores, b_k, acc=b_dq * scale, input_precision=PRECISION)
    b_dk = tl.dot(d_scores_t, b_q, acc=b_dk, input_precision=PRECISION)
    b_dk = tl.dot(d_lower_t, b_k, acc=b_dk, input_precision=PRECISION)
    b_dk += b_beta[:, None] * b_y

    along_y = tl.sum(wide_k * b_y, axis=1)
    along_q = tl.sum(b_q.to(tl.float32) * b_dq, axis=1)
    along_k = tl.sum(wide_k * b_dk, axis=1)
    tl.store(dbeta + first * HV + hv + row * HV, (b_dbeta + along_y).to(dbeta.dtype.element_ty), mask=live)
    if NORMALIZE:
        # y = x r with r = (sum x^2 + eps)^-1/2:  dx = r (dy - y <y, dy>), exact with eps.
        r_q = tl.load(q_factor + by_key_head * BT + row)
        r_k = tl.load(k_factor + by_key_head * BT + row)
        b_dq = (b_dq - b_q.to(tl.float32) * along_q[:, None]) * r_q[:, None]
        b_dk = (b_dk - wide_k * along_k[:, None]) * r_k[:, None]
    mask_k = live[:, None] & (channel < K)[None, :]
    at_out = (first * HV + hv) * K + row[:, None] * (HV * K) + channel[None, :]
    tl.store(dq + at_out, b_dq.to(dq.dtype.element_ty), mask=mask_k)
    tl.store(dk + at_out, b_dk.to(dk.dtype.element_ty), mask=mask_k)
    if GATED:
        d_g = along_q - along_k + 2.0 * b_beta * along_y
        d_g = tl.cumsum(d_g, axis=0, reverse=True)
        # What G_end gets, the same for all rows. The vectors are summed as rows of a matrix: Blackwell's compiler (Triton
        # 3.7) fails on the sum of a vector here.
        d_g += tl.sum(tl.broadcast_to(along_end[None, :], [BT, BT]), axis=1)
        d_g += tl.exp2(end) * tl.sum(tl.broadcast_to(overlap[None, :], [BT, BV]), axis=1)
        tl.store(dg + first * HV + hv + row * HV, d_g.to(dg.dtype.element_ty), mask=live)
