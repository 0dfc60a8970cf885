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


@triton.jit(do_not_specialize=["T", "total"])
def gradients_kernel(
    q,  # [total, H, K], of unit length if NORMALIZE
    k,
    v,  # [total, HV, V]
    do,  # [total, HV, V]
    rates,  # [HV, total] fp32: beta
    cumulative,  # [HV, total] fp32, log2 units, if GATED
    states,  # [chunks, HV, V, K]: S' at the start of each chunk
    d_states,  # [chunks, HV, V, K]: gradient of S' at the end of each chunk
    v_new,  # [total, HV, V]
    d_error,  # [total, HV, V]
    q_factor,  # [H, total] fp32, if NORMALIZE
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
    total,
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
    row = tl.arange(0, BT)
    live = row < left
    channel = tl.arange(0, BK)
    mask_k = live[:, None] & (channel < K)[None, :]

    by_head = hv * tl.cast(total, tl.int64) + first
    b_beta = tl.load(rates + by_head + row, mask=live, other=0.0)
    states += (tl.cast(slot, tl.int64) * HV + hv) * K * V
    d_states += (tl.cast(slot, tl.int64) * HV + hv) * K * V
    by_value = (first * HV + hv) * V

    d_scores = tl.zeros([BT, BT], dtype=tl.float32)
    d_scores_t = tl.zeros([BT, BT], dtype=tl.float32)
    d_lower = tl.zeros([BT, BT], dtype=tl.float32)
    d_lower_t = tl.zeros([BT, BT], dtype=tl.float32)
    b_dq = tl.zeros([BT, BK], dtype=tl.float32)
    b_dk = tl.zeros([BT, BK], dtype=tl.float32)
    b_y = tl.zeros([BT, BK], dtype=tl.float32)
    b_dbeta = tl.zeros([BT], dtype=tl.float32)
    overlap = tl.zeros([BV], dtype=tl.float32)
    for i_v in range(tl.cdiv(V, BV)):
        value = i_v * BV + tl.arange(0, BV)
        at_v = by_value + row[:, None] * (HV * V) + value[None, :]
        mask_v = live[:, None] & (value < V)[None, :]
        at_s = value[:, None] * K + channel[None, :]
        mask_s = (value < V)[:, None] & (channel < K)[None, :]
        b_do = tl.load(do + at_v, mask=mask_v, other=0.0)
        b_new = tl.load(v_new + at_v, mask=mask_v, other=0.0)
        b_x = tl.load(d_error + at_v, mask=mask_v, other=0.0)
        b_v = tl.load(v + at_v, mask=mask_v, other=0.0)
        b_s = tl.load(states + at_s, mask=mask_s, other=0.0)
        b_ds = tl.load(d_states + at_s, mask=mask_s, other=0.0)
        # Each square tile is made twice, once transposed: transposing a product is what some Triton versions got wrong.
        d_scores = tl.dot(b_do, tl.trans(b_new), acc=d_scores, input_precision=PRECISION)
        d_scores_t = tl.dot(b_new, tl.trans(b_do), acc=d_scores_t, input_precision=PRECISION)
        d_lower = tl.dot(b_x, tl.trans(b_new), acc=d_lower, input_precision=PRECISION)
        d_lower_t = tl.dot(b_new, tl.trans(b_x), acc=d_lower_t, input_precision=PRECISION)
        b_dq = tl.dot(b_do, b_s, acc=b_dq, input_precision=PRECISION)
        b_dk = tl.dot(b_new, b_ds, acc=b_dk, input_precision=PRECISION)
        b_y = tl.dot(b_x, b_s, acc=b_y, input_precision=PRECISION)
        wide_x = b_x.to(tl.float32)
        b_dbeta += tl.sum(wide_x * b_v.to(tl.float32), axis=1)
        if GATED:
            overlap += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), axis=1)
        tl.store(dv + at_v, (wide_x * b_beta[:, None]).to(dv.dtype.element_ty), mask=mask_v)

    at_k = row[:, None] * (H * K) + channel[None, :]
    b_k = tl.load(k + (first * H + h) * K + at_k, mask=mask_k, other=0.0)
    b_q = tl.load(q + (first * H + h) * K + at_k, mask=mask_k, other=0.0)
    wide_k = b_k.to(tl.float32)
    lower = row[:, None] > row[None, :]
    upper = row[:, None] < row[None, :]
    ends_gradient = 0.0
    if GATED:
        b_g = tl.load(cumulative + by_head + row, mask=live, other=0.0)
        end = tl.load(cumulative + by_head + tl.minimum(BT, left) - 1)
        decay = tl.exp2(tl.where(lower, b_g[:, None] - b_g[None, :], 0.0))
        decay_t = tl.exp2(tl.where(upper, b_g[None, :] - b_g[:, None], 0.0))
        d_scores *= decay
        d_lower *= decay
        d_scores_t *= decay_t
        d_lower_t *= decay_t
        from_start = tl.exp2(b_g)
        b_dq *= from_start[:, None]
        b_y *= from_start[:, None]
        b_dk *= tl.exp2(tl.where(live, end - b_g, 0.0))[:, None]
        ends_gradient = tl.sum(tl.sum(b_dk * wide_k, axis=1), axis=0) + tl.exp2(end) * tl.sum(overlap, axis=0)
    # dL = -X V_new^T carries a minus sign. It is taken up here, by subtracting.
    b_y = tl.dot(tl.where(lower, -d_lower, 0.0).to(b_k.dtype), b_k, acc=-b_y, input_precision=PRECISION)
    d_scores = tl.where(upper, 0.0, d_scores * scale)
    d_scores_t = tl.where(lower, 0.0, d_scores_t * scale)
    b_dq = tl.dot(d_scores.to(b_k.dtype), b_k, acc=b_dq * scale, input_precision=PRECISION)
    b_dk = tl.dot(d_scores_t.to(b_k.dtype), b_q, acc=b_dk, input_precision=PRECISION)
    d_lower_t = tl.where(upper, d_lower_t * (-b_beta)[None, :], 0.0)
    b_dk = tl.dot(d_lower_t.to(b_k.dtype), b_k, acc=b_dk, input_precision=PRECISION)
    b_dk += b_beta[:, None] * b_y

    along_y = tl.sum(wide_k * b_y, axis=1)
    along_q = tl.sum(b_q.to(tl.float32) * b_dq, axis=1)
    along_k = tl.sum(wide_k * b_dk, axis=1)
    tl.store(dbeta + first * HV + hv + row * HV, (b_dbeta + along_y).to(dbeta.dtype.element_ty), mask=live)
    if GATED:
        d_g = along_q - along_k + 2.0 * b_beta * along_y
        d_g = tl.cumsum(d_g, axis=0, reverse=True) + ends_gradient
        tl.store(dg + first * HV + hv + row * HV, d_g.to(dg.dtype.element_ty), mask=live)
    if NORMALIZE:
        # y = x r with r = (sum x^2 + eps)^-1/2:  dx = r (dy - y <y, dy>), exact with eps.
        by_key_head = h * tl.cast(total, tl.int64) + first
        r_q = tl.load(q_factor + by_key_head + row, mask=live, other=0.0)
        r_k = tl.load(k_factor + by_key_head + row, mask=live, other=0.0)
        b_dq = (b_dq - b_q.to(tl.float32) * along_q[:, None]) * r_q[:, None]
        b_dk = (b_dk - wide_k * along_k[:, None]) * r_k[:, None]
    at_out = (first * HV + hv) * K + row[:, None] * (HV * K) + channel[None, :]
    tl.store(dq + at_out, b_dq.to(dq.dtype.element_ty), mask=mask_k)
    tl.store(dk + at_out, b_dk.to(dk.dtype.element_ty), mask=mask_k)
