"""Gradients of q, k and a channel gate, chunk by chunk: the formulas of `triton_backward.py`, pairs taken level by level."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.common.chunks import locate_chunk
from kernels.common.tiles import die_order
from kernels.gated_linear_attention.triton_backward import state_products
from kernels.gated_linear_attention.triton_gates import level_factors, level_pairs


@triton.jit(do_not_specialize=["T", "scale"])
def channel_backward_kernel(
    q, k, v, do, G, W, states, dstates, dq, dk, dg, cu_seqlens, indices, scale, T,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, LEVELS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, DIES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dg [tokens, HV, K]. G [tokens, HV, K] fp32; W [tokens, HV, BT] without decays; K tiles are independent.

    q, k [tokens, H, K]; v, do [tokens, HV, V]; states, dstates [slots, HV, K, V]. Grid: slots x HV x K tiles, K tiles
    fastest.
    """
    blocks_k: tl.constexpr = (K + BK - 1) // BK
    pid = die_order(tl.program_id(0), tl.num_programs(0), blocks_k * (HV // H), DIES)
    ks = pid % blocks_k * BK + tl.arange(0, BK)
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
            HV, K, V, BT, BK, BV, True, PRECISION,
        )  # fmt: skip
        mask_k = valid[:, None] & (ks < K)[None, :]
        q += (token * H + hv // (HV // H)) * K
        k += (token * H + hv // (HV // H)) * K
        G += (token * HV + hv) * K
        W += (token * HV + hv) * BT
        b_q = tl.load(q + row[:, None] * (H * K) + ks[None, :], mask=mask_k, other=0.0)
        b_k = tl.load(k + row[:, None] * (H * K) + ks[None, :], mask=mask_k, other=0.0)
        b_G = tl.load(G + row[:, None] * (HV * K) + ks[None, :], mask=mask_k, other=0.0)
        last = tl.load(G + (rows - 1) * (HV * K) + ks, mask=ks < K, other=0.0)
        a_dq *= tl.exp2(b_G) * scale
        a_dk *= tl.exp2(last[None, :] - b_G)
        at_end = tl.exp2(last) * inner + tl.sum(a_dk * b_k.to(tl.float32), axis=0)
        diagonal = tl.load(W + row * (HV * BT) + row, mask=valid, other=0.0).to(tl.float32)[:, None]
        a_dq += diagonal * b_k.to(tl.float32)
        a_dk += diagonal * b_q.to(tl.float32)
        pairs = tl.load(W + row[:, None] * (HV * BT) + row[None, :], mask=valid[:, None], other=0.0)
        for level in tl.range(LEVELS, num_stages=1):
            upper, factor = level_factors(b_G, G, row, ks, rows, level, HV, K)
            # One product serves both: rows in upper halves collect keys for dq, rows in lower halves queries for dk.
            x = (tl.where(upper[:, None], b_q, b_k).to(tl.float32) * factor).to(b_q.dtype)
            weights = tl.where(level_pairs(row, level), pairs, 0.0).to(b_q.dtype)
            y = tl.dot(weights, x, input_precision=PRECISION) * factor
            a_dq += tl.where(upper[:, None], y, 0.0)
            a_dk += tl.where(upper[:, None], 0.0, y)
        at = (token * HV + hv) * K + row[:, None] * (HV * K) + ks[None, :]
        tl.store(dq + at, a_dq.to(dq.dtype.element_ty), mask=mask_k)
        tl.store(dk + at, a_dk.to(dk.dtype.element_ty), mask=mask_k)
        # Read again, from the cache: held in registers through the levels they would overflow them.
        b_q = tl.load(q + row[:, None] * (H * K) + ks[None, :], mask=mask_k, other=0.0)
        b_k = tl.load(k + row[:, None] * (H * K) + ks[None, :], mask=mask_k, other=0.0)
        change = b_q.to(tl.float32) * a_dq - b_k.to(tl.float32) * a_dk
        total = tl.cumsum(change, axis=0, reverse=True) + at_end[None, :]
        tl.store(dg + at, total, mask=mask_k)
