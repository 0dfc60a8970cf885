"""Gradients of q, k and the gate (and of v where one K tile spans the head), chunk by chunk.

With S the state at the chunk's start, dS the gradient at its end, dA = tril(do v^T):

    dq = scale (e^G do S^T + sum_j dA_ij k_j E_ij)          E_ij = exp(G_i - G_j)
    dk = e^(G_C - G) v dS^T + scale sum_i dA_ij q_i E_ij
    dg_t = sum_(i >= t) (q_i dq_i - k_i dk_i) + e^(G_C) <S, dS> + sum_i k_i (e^(G_C - G_i) v_i dS^T)

(arXiv:2312.06635, appendix C, in a chunk-local form that needs no sum across chunks.) Products with dA are written with
do v^T and with v do^T, so that no accumulator is ever transposed. The V tiles are walked twice, first for dA, then for the
products with the states: the second reading comes from a cache, and holding all four accumulators at once would spill.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.common.chunks import locate_chunk
from kernels.gated_linear_attention.triton_gates import level_factors, level_pairs
from kernels.gated_linear_attention.triton_output import scalar_decay


@triton.jit
def _score_gradients(
    v, do, row, valid, HV: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """do v^T and its transpose v do^T, [BT, BT] fp32, not masked."""
    dA = tl.zeros([BT, BT], dtype=tl.float32)
    dA_t = tl.zeros([BT, BT], dtype=tl.float32)
    for block_v in range((V + BV - 1) // BV):
        vs = block_v * BV + tl.arange(0, BV)
        at = row[:, None] * (HV * V) + vs[None, :]
        mask = valid[:, None] & (vs < V)[None, :]
        b_v = tl.load(v + at, mask=mask, other=0.0)
        b_do = tl.load(do + at, mask=mask, other=0.0)
        dA = tl.dot(b_do, tl.trans(b_v), dA, input_precision=PRECISION)
        dA_t = tl.dot(b_v, tl.trans(b_do), dA_t, input_precision=PRECISION)
    return dA, dA_t


@triton.jit(do_not_specialize=["T", "scale", "tokens"])
def backward_kernel(
    q, k, v, do, G, states, dstates, dq, dk, dv, dg, cu_seqlens, indices, scale, T, tokens,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, WITH_DV: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scalar gate (GATE 1) or none (GATE 0). q, k [tokens, H, K]; v, do [tokens, HV, V]; states, dstates [slots, HV, K, V].

    dq, dk [tokens, HV, K]; dv [tokens, HV, V] (WITH_DV, needs BK >= K); dg [K tiles, tokens, HV]: the part of each K
    tile. Grid: slots x HV x K tiles, K tiles fastest.
    """
    pid = tl.program_id(0)
    blocks_k: tl.constexpr = (K + BK - 1) // BK
    block = pid % blocks_k
    ks = block * BK + tl.arange(0, BK)
    hv = pid // blocks_k % HV
    slot = pid // (blocks_k * HV)
    sequence, chunk, begin, length = locate_chunk(slot, cu_seqlens, indices, T, BT, PACKED)
    if sequence >= 0:
        token = begin + chunk * BT
        rows = tl.minimum(length - chunk * BT, BT)
        row = tl.arange(0, BT)
        valid = row < rows
        q += (token * H + hv // (HV // H)) * K
        k += (token * H + hv // (HV // H)) * K
        v += (token * HV + hv) * V
        do += (token * HV + hv) * V
        states += (tl.cast(slot, tl.int64) * HV + hv) * (K * V)
        dstates += (tl.cast(slot, tl.int64) * HV + hv) * (K * V)
        b_G = row * 0.0
        G_last = 0.0
        if GATE == 1:
            G += token * HV + hv
            b_G = tl.load(G + row * HV, mask=valid, other=0.0)
            G_last = tl.load(G + (rows - 1) * HV)

        dA, dA_t = _score_gradients(v, do, row, valid, HV, V, BT, BV, PRECISION)
        pairs = (dA * scalar_decay(b_G, b_G, row, row, rows, GATE, False)).to(q.dtype.element_ty)
        decay_t = scalar_decay(b_G, b_G, row, row, rows, GATE, True) * scale
        pairs_t = (dA_t * decay_t).to(q.dtype.element_ty)

        mask_k = valid[:, None] & (ks < K)[None, :]
        b_q = tl.load(q + row[:, None] * (H * K) + ks[None, :], mask=mask_k, other=0.0)
        b_k = tl.load(k + row[:, None] * (H * K) + ks[None, :], mask=mask_k, other=0.0)
        if WITH_DV:
            weights = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
            weights = (weights * decay_t).to(b_q.dtype)
            decayed = b_k
            if GATE == 1:
                decayed = (b_k.to(tl.float32) * tl.exp2(G_last - b_G)[:, None]).to(b_k.dtype)
        a_dq = tl.zeros([BT, BK], dtype=tl.float32)
        a_dk = tl.zeros([BT, BK], dtype=tl.float32)
        inner = tl.zeros([BK], dtype=tl.float32)
        for block_v in range((V + BV - 1) // BV):
            vs = block_v * BV + tl.arange(0, BV)
            mask_v = valid[:, None] & (vs < V)[None, :]
            mask_s = (ks < K)[:, None] & (vs < V)[None, :]
            b_v = tl.load(v + row[:, None] * (HV * V) + vs[None, :], mask=mask_v, other=0.0)
            b_do = tl.load(do + row[:, None] * (HV * V) + vs[None, :], mask=mask_v, other=0.0)
            S = tl.load(states + ks[:, None] * V + vs[None, :], mask=mask_s, other=0.0)
            dS = tl.load(dstates + ks[:, None] * V + vs[None, :], mask=mask_s, other=0.0)
            a_dq = tl.dot(b_do.to(S.dtype), tl.trans(S), a_dq, input_precision=PRECISION)
            a_dk = tl.dot(b_v.to(S.dtype), tl.trans(dS), a_dk, input_precision=PRECISION)
            if GATE == 1:
                inner += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=1)
            if WITH_DV:
                a_dv = tl.dot(decayed.to(S.dtype), dS, input_precision=PRECISION)
                a_dv = tl.dot(weights, b_do, a_dv, input_precision=PRECISION)
                pointer = dv + (token * HV + hv) * V + row[:, None] * (HV * V) + vs[None, :]
                tl.store(pointer, a_dv.to(dv.dtype.element_ty), mask=mask_v)
        if GATE == 1:
            a_dq *= tl.exp2(b_G)[:, None]
            a_dk *= tl.exp2(G_last - b_G)[:, None]
            at_end = tl.exp2(G_last) * tl.sum(inner) + tl.sum(a_dk * b_k.to(tl.float32))
        a_dq = tl.dot(pairs, b_k, a_dq, input_precision=PRECISION) * scale
        a_dk = tl.dot(pairs_t, b_q, a_dk, input_precision=PRECISION)
        at = (token * HV + hv) * K + row[:, None] * (HV * K) + ks[None, :]
        tl.store(dq + at, a_dq.to(dq.dtype.element_ty), mask=mask_k)
        tl.store(dk + at, a_dk.to(dk.dtype.element_ty), mask=mask_k)
        if GATE == 1:
            change = tl.sum(b_q.to(tl.float32) * a_dq - b_k.to(tl.float32) * a_dk, axis=1)
            total = tl.cumsum(change, axis=0, reverse=True) + at_end
            pointer = dg + (tl.cast(block, tl.int64) * tokens + token) * HV + hv + row * HV
            tl.store(pointer, total, mask=valid)


@triton.jit(do_not_specialize=["T", "scale"])
def channel_backward_kernel(
    q, k, v, do, G, states, dstates, dq, dk, dg, cu_seqlens, indices, scale, T,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, LEVELS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Channel gate: dq, dk, dg [tokens, HV, K]. G [tokens, HV, K]; the rest as above. K tiles are independent.

    The sums over pairs go level by level as in `prepare_kernel`.
    """
    pid = tl.program_id(0)
    blocks_k: tl.constexpr = (K + BK - 1) // BK
    ks = pid % blocks_k * BK + tl.arange(0, BK)
    hv = pid // blocks_k % HV
    slot = pid // (blocks_k * HV)
    sequence, chunk, begin, length = locate_chunk(slot, cu_seqlens, indices, T, BT, PACKED)
    if sequence >= 0:
        token = begin + chunk * BT
        rows = tl.minimum(length - chunk * BT, BT)
        row = tl.arange(0, BT)
        valid = row < rows
        q += (token * H + hv // (HV // H)) * K
        k += (token * H + hv // (HV // H)) * K
        G += (token * HV + hv) * K
        v += (token * HV + hv) * V
        do += (token * HV + hv) * V
        states += (tl.cast(slot, tl.int64) * HV + hv) * (K * V)
        dstates += (tl.cast(slot, tl.int64) * HV + hv) * (K * V)

        dA, dA_t = _score_gradients(v, do, row, valid, HV, V, BT, BV, PRECISION)
        diagonal = tl.sum(tl.where(row[:, None] == row[None, :], dA, 0.0), axis=1)[:, None]
        # dA below the diagonal, its transpose above.
        pairs = tl.where(row[:, None] > row[None, :], dA, dA_t).to(q.dtype.element_ty)

        a_dq = tl.zeros([BT, BK], dtype=tl.float32)
        a_dk = tl.zeros([BT, BK], dtype=tl.float32)
        inner = tl.zeros([BK], dtype=tl.float32)
        for block_v in range((V + BV - 1) // BV):
            vs = block_v * BV + tl.arange(0, BV)
            mask_v = valid[:, None] & (vs < V)[None, :]
            mask_s = (ks < K)[:, None] & (vs < V)[None, :]
            b_v = tl.load(v + row[:, None] * (HV * V) + vs[None, :], mask=mask_v, other=0.0)
            b_do = tl.load(do + row[:, None] * (HV * V) + vs[None, :], mask=mask_v, other=0.0)
            S = tl.load(states + ks[:, None] * V + vs[None, :], mask=mask_s, other=0.0)
            dS = tl.load(dstates + ks[:, None] * V + vs[None, :], mask=mask_s, other=0.0)
            a_dq = tl.dot(b_do.to(S.dtype), tl.trans(S), a_dq, input_precision=PRECISION)
            a_dk = tl.dot(b_v.to(S.dtype), tl.trans(dS), a_dk, input_precision=PRECISION)
            inner += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=1)

        mask_k = valid[:, None] & (ks < K)[None, :]
        b_q = tl.load(q + row[:, None] * (H * K) + ks[None, :], mask=mask_k, other=0.0)
        b_k = tl.load(k + row[:, None] * (H * K) + ks[None, :], mask=mask_k, other=0.0)
        b_G = tl.load(G + row[:, None] * (HV * K) + ks[None, :], mask=mask_k, other=0.0)
        last = tl.load(G + (rows - 1) * (HV * K) + ks, mask=ks < K, other=0.0)
        a_dq *= tl.exp2(b_G)
        a_dk *= tl.exp2(last[None, :] - b_G)
        at_end = tl.exp2(last) * inner + tl.sum(a_dk * b_k.to(tl.float32), axis=0)
        a_dq += diagonal * b_k.to(tl.float32)
        a_dk += diagonal * b_q.to(tl.float32) * scale
        for level in tl.range(LEVELS, num_stages=1):
            upper, factor = level_factors(b_G, G, row, ks, rows, level, HV, K)
            # One product serves both: rows in upper halves collect keys for dq, rows in lower halves queries for dk.
            x = (tl.where(upper[:, None], b_q.to(tl.float32) * scale, b_k.to(tl.float32)) * factor).to(b_q.dtype)
            weights = tl.where(level_pairs(row, level), pairs, 0.0).to(b_q.dtype)
            y = tl.dot(weights, x, input_precision=PRECISION) * factor
            a_dq += tl.where(upper[:, None], y, 0.0)
            a_dk += tl.where(upper[:, None], 0.0, y)
        a_dq *= scale
        at = (token * HV + hv) * K + row[:, None] * (HV * K) + ks[None, :]
        tl.store(dq + at, a_dq.to(dq.dtype.element_ty), mask=mask_k)
        tl.store(dk + at, a_dk.to(dk.dtype.element_ty), mask=mask_k)
        change = b_q.to(tl.float32) * a_dq - b_k.to(tl.float32) * a_dk
        total = tl.cumsum(change, axis=0, reverse=True) + at_end[None, :]
        tl.store(dg + at, total, mask=mask_k)
