"""Gradients of q, k and a scalar gate, chunk by chunk.

With S the state at the chunk's start, dS the gradient at its end, dA = tril(do v^T):

    dq = scale (e^G do S^T + sum_j dA_ij k_j E_ij)          E_ij = exp(G_i - G_j)
    dk = e^(G_C - G) v dS^T + scale sum_i dA_ij q_i E_ij
    dg_t = sum_(i >= t) (q_i dq_i - k_i dk_i) + e^(G_C) <S, dS> + sum_i k_i (e^(G_C - G_i) v_i dS^T)

(arXiv:2312.06635, appendix C, in a chunk-local form that needs no sum across chunks.) dA has its own kernel: with its
accumulators beside those of dq and dk the registers overflow, and every K tile would compute it again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.common.chunks import locate_chunk
from kernels.common.tiles import die_order


@triton.jit(do_not_specialize=["T", "scale"])
def score_gradient_kernel(
    v, do, G, W, cu_seqlens, indices, scale, T,
    HV: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W [tokens, HV, BT]: on and below the diagonal scale dA_ij E_ij, for dq; above it the transpose, for dk.

    The transpose is computed as v do^T, so that no accumulator is ever transposed. For a channel gate (GATE 2) E is
    left to the kernel that knows the channels. v, do [tokens, HV, V]; G [tokens, HV]. Grid: slots x HV.
    """
    pid = tl.program_id(0)
    hv = pid % HV
    slot = pid // HV
    sequence, chunk, begin, length = locate_chunk(slot, cu_seqlens, indices, T, BT, PACKED)
    if sequence >= 0:
        token = begin + chunk * BT
        rows = tl.minimum(length - chunk * BT, BT)
        row = tl.arange(0, BT)
        valid = row < rows
        v += (token * HV + hv) * V
        do += (token * HV + hv) * V
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
        pairs = tl.where(row[:, None] >= row[None, :], dA, dA_t) * scale
        if GATE == 1:
            b_G = tl.load(G + token * HV + hv + row * HV, mask=valid, other=0.0)
            both = valid[:, None] & valid[None, :]
            pairs *= tl.exp2(-tl.abs(tl.where(both, b_G[:, None] - b_G[None, :], 0.0)))
        W += (token * HV + hv) * BT
        tl.store(W + row[:, None] * (HV * BT) + row[None, :], pairs.to(W.dtype.element_ty), mask=valid[:, None])


@triton.jit
def state_products(
    v, do, states, dstates, row, valid, ks, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """do S^T and v dS^T [BT, BK], and rowsum(S dS) [BK] if INNER, fp32."""
    a_dq = tl.zeros([BT, BK], dtype=tl.float32)
    a_dk = tl.zeros([BT, BK], dtype=tl.float32)
    inner = tl.zeros([BK], dtype=tl.float32)
    for block_v in range((V + BV - 1) // BV):
        vs = block_v * BV + tl.arange(0, BV)
        at = row[:, None] * (HV * V) + vs[None, :]
        mask_v = valid[:, None] & (vs < V)[None, :]
        mask_s = (ks < K)[:, None] & (vs < V)[None, :]
        b_do = tl.load(do + at, mask=mask_v, other=0.0)
        S = tl.load(states + ks[:, None] * V + vs[None, :], mask=mask_s, other=0.0)
        a_dq = tl.dot(b_do.to(S.dtype), tl.trans(S), a_dq, input_precision=PRECISION)
        b_v = tl.load(v + at, mask=mask_v, other=0.0)
        dS = tl.load(dstates + ks[:, None] * V + vs[None, :], mask=mask_s, other=0.0)
        a_dk = tl.dot(b_v.to(S.dtype), tl.trans(dS), a_dk, input_precision=PRECISION)
        if INNER:
            inner += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=1)
    return a_dq, a_dk, inner


@triton.jit(do_not_specialize=["T", "scale", "tokens"])
def backward_kernel(
    q, k, v, do, G, W, states, dstates, dq, dk, dg, cu_seqlens, indices, scale, T, tokens,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
    DIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scalar gate (GATE 1) or none (GATE 0). q, k [tokens, H, K]; v, do [tokens, HV, V]; W [tokens, HV, BT].

    states, dstates [slots, HV, K, V]; dq, dk [tokens, HV, K]; dg [K tiles, tokens, HV]: the part of each K tile.
    Grid: slots x HV x K tiles, K tiles fastest.
    """
    blocks_k: tl.constexpr = (K + BK - 1) // BK
    pid = die_order(tl.program_id(0), tl.num_programs(0), blocks_k * (HV // H), DIES)
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
        value = (token * HV + hv) * V
        state = (tl.cast(slot, tl.int64) * HV + hv) * (K * V)
        a_dq, a_dk, inner = state_products(
            v + value, do + value, states + state, dstates + state, row, valid, ks,
            HV, K, V, BT, BK, BV, GATE == 1, PRECISION,
        )  # fmt: skip
        a_dq *= scale
        mask_k = valid[:, None] & (ks < K)[None, :]
        key = (token * H + hv // (HV // H)) * K
        b_q = tl.load(q + key + row[:, None] * (H * K) + ks[None, :], mask=mask_k, other=0.0)
        b_k = tl.load(k + key + row[:, None] * (H * K) + ks[None, :], mask=mask_k, other=0.0)
        if GATE == 1:
            G += token * HV + hv
            b_G = tl.load(G + row * HV, mask=valid, other=0.0)
            G_last = tl.load(G + (rows - 1) * HV)
            a_dq *= tl.exp2(b_G)[:, None]
            a_dk *= tl.exp2(G_last - b_G)[:, None]
            at_end = tl.exp2(G_last) * tl.sum(inner) + tl.sum(a_dk * b_k.to(tl.float32))
        W += (token * HV + hv) * BT
        pairs = tl.load(W + row[:, None] * (HV * BT) + row[None, :], mask=valid[:, None], other=0.0)
        later = row[:, None] >= row[None, :]
        a_dq = tl.dot(tl.where(later, pairs, 0.0).to(b_k.dtype), b_k, a_dq, input_precision=PRECISION)
        earlier = row[:, None] <= row[None, :]
        a_dk = tl.dot(tl.where(earlier, pairs, 0.0).to(b_q.dtype), b_q, a_dk, input_precision=PRECISION)
        at = (token * HV + hv) * K + row[:, None] * (HV * K) + ks[None, :]
        tl.store(dq + at, a_dq.to(dq.dtype.element_ty), mask=mask_k)
        tl.store(dk + at, a_dk.to(dk.dtype.element_ty), mask=mask_k)
        if GATE == 1:
            change = tl.sum(b_q.to(tl.float32) * a_dq - b_k.to(tl.float32) * a_dk, axis=1)
            total = tl.cumsum(change, axis=0, reverse=True) + at_end
            pointer = dg + (tl.cast(block, tl.int64) * tokens + token) * HV + hv + row * HV
            tl.store(pointer, total, mask=valid)
