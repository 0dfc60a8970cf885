"""Inside a chunk with a gate a channel (KDA): decayed copies of q and k, and the two square tiles.

    P_ij = Σ_k k_ik k_jk exp(G_ik - G_jk)  (i > j);   attention_ij = scale Σ_k q_ik k_jk exp(G_ik - G_jk)  (i >= j)

The decay does not factor out of the sum, and exp(G_i) exp(-G_j) overflows. Between rows i and columns j lies a reference
row r, i >= r > j, and exp(G_i - G_r) exp(G_r - G_j) has exponents <= 0 only. Dyadic references serve all pairs: at level s
the chunk is cut in blocks of 2 s rows, r is the middle of the block, rows are its second half and columns its first.
Each pair i > j belongs to exactly one level, both factors of a level are exp(-|G - G_r|), and each level is one matrix
product; no pair is left to scalar arithmetic, however strong the gate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.common.chunks import locate_chunk
from kernels.common.tiles import die_order_rows
from kernels.common.triangular import unit_lower_inverse
from kernels.delta_rule.triton_prepare import LOG2E, LOWEST, unit_rows


@triton.jit(do_not_specialize=["T"])
def channel_gate_kernel(
    q,  # [total, H, K]
    k,  # [total, H, K]
    beta,  # [total, HV]
    g,  # [total, HV, K] natural log
    q_unit,  # [slots, H, BT, BK] out: q, of unit length if NORMALIZE
    k_unit,
    q_factor,  # [slots, H, BT] fp32 out, if NORMALIZE: 1 / length of each row of q
    k_factor,
    rates,  # [slots, HV, BT] fp32 out: beta
    cumulative,  # [slots, HV, BT, BK] fp32 out: G in units of log2
    q_in,  # [slots, HV, BT, BK] out: scale q exp(G)
    k_in,  # [slots, HV, BT, BK] out: k exp(G)
    k_out,  # [slots, HV, BT, BK] out: k exp(G_end - G)
    ends,  # [slots, HV, BK] fp32 out: exp(G_end)
    cu_seqlens,
    indices,
    scale,
    T,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr,
    DIES: tl.constexpr,
):
    hv, slot = die_order_rows(HV // H, DIES)
    sequence, chunk, begin, length = locate_chunk(slot, cu_seqlens, indices, T, BT, PACKED)
    if sequence < 0:
        return
    h = hv // (HV // H)
    first = begin + chunk * BT
    by_key_head = tl.cast(slot, tl.int64) * H + h
    by_head = tl.cast(slot, tl.int64) * HV + hv
    row = tl.arange(0, BT)
    column = tl.arange(0, BK)
    live = row < length - chunk * BT
    mask = live[:, None] & (column < K)[None, :]
    at_user = row[:, None] * (H * K) + column[None, :]
    within = row[:, None] * BK + column[None, :]

    b_beta = tl.load(beta + first * HV + hv + row * HV, mask=live, other=0.0).to(tl.float32)
    tl.store(rates + by_head * BT + row, b_beta)
    b_g = tl.load(g + (first * HV + hv) * K + row[:, None] * (HV * K) + column[None, :], mask=mask, other=0.0)
    b_g = tl.cumsum(tl.maximum(b_g.to(tl.float32) * LOG2E, LOWEST), axis=0)
    tl.store(cumulative + by_head * BT * BK + within, b_g)
    # No gate is positive, so the last row holds the least sum.
    end = tl.min(b_g, axis=0)
    tl.store(ends + by_head * BK + column, tl.exp2(end))
    from_start = tl.exp2(b_g)

    b_q = tl.load(q + (first * H + h) * K + at_user, mask=mask, other=0.0)
    wide = b_q.to(tl.float32)
    if NORMALIZE:
        wide, factor = unit_rows(wide)
        tl.store(q_factor + by_key_head * BT + row, factor, mask=hv % (HV // H) == 0)
    if hv % (HV // H) == 0:
        tl.store(q_unit + by_key_head * BT * BK + within, wide.to(b_q.dtype))
    tl.store(q_in + by_head * BT * BK + within, (wide * from_start * scale).to(b_q.dtype))

    b_k = tl.load(k + (first * H + h) * K + at_user, mask=mask, other=0.0)
    wide = b_k.to(tl.float32)
    if NORMALIZE:
        wide, factor = unit_rows(wide)
        tl.store(k_factor + by_key_head * BT + row, factor, mask=hv % (HV // H) == 0)
    if hv % (HV // H) == 0:
        tl.store(k_unit + by_key_head * BT * BK + within, wide.to(b_k.dtype))
    tl.store(k_in + by_head * BT * BK + within, (wide * from_start).to(b_k.dtype))
    tl.store(k_out + by_head * BT * BK + within, (wide * tl.exp2(end[None, :] - b_g)).to(b_k.dtype))


@triton.jit
def level_decay(cumulative, b_g, row, column, s, BK: tl.constexpr):
    """exp(-|G - G_r|) of the level with halves of s rows. cumulative: pointer to the chunk's G."""
    middle = row // (2 * s) * (2 * s) + s
    reference = tl.load(cumulative + middle[:, None] * BK + column[None, :])
    return tl.exp2(-tl.abs(b_g - reference))


@triton.jit
def level_pairs(i, j, s):
    """The pairs i > j that the level with halves of s rows serves."""
    return (i // (2 * s) == j // (2 * s)) & (i // s > j // s)


@triton.jit(do_not_specialize=["T"])
def channel_tiles_kernel(
    q_unit,  # [slots, H, BT, BK]
    k_unit,
    rates,  # [slots, HV, BT] fp32
    cumulative,  # [slots, HV, BT, BK] fp32
    inverse,  # [slots, HV, BT, BT] out
    attention,  # [slots, HV, BT, BT] out
    cu_seqlens,
    indices,
    scale,
    T,
    H: tl.constexpr,
    HV: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,  # channels at a time
    LEVELS: tl.constexpr,  # log2(BT)
    PACKED: tl.constexpr,
    DIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    hv, slot = die_order_rows(HV // H, DIES)
    sequence, chunk, _, length = locate_chunk(slot, cu_seqlens, indices, T, BT, PACKED)
    if sequence < 0:
        return
    h = hv // (HV // H)
    by_key_head = tl.cast(slot, tl.int64) * H + h
    by_head = tl.cast(slot, tl.int64) * HV + hv
    row = tl.arange(0, BT)

    products = tl.zeros([BT, BT], dtype=tl.float32)
    scores = tl.zeros([BT, BT], dtype=tl.float32)
    own = tl.zeros([BT], dtype=tl.float32)
    for start in range(0, BK, BC):
        column = start + tl.arange(0, BC)
        within = row[:, None] * BK + column[None, :]
        b_k = tl.load(k_unit + by_key_head * BT * BK + within)
        b_q = tl.load(q_unit + by_key_head * BT * BK + within)
        b_g = tl.load(cumulative + by_head * BT * BK + within)
        own += tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32), axis=1)
        # A real loop, not an unrolled one: the compiler would start all levels at once and run out of registers.
        for level in range(LEVELS):
            s = BT >> (level + 1)
            decay = level_decay(cumulative + by_head * BT * BK, b_g, row, column, s, BK)
            pairs = level_pairs(row[:, None], row[None, :], s)
            k_near = (b_k.to(tl.float32) * decay).to(b_k.dtype)
            q_near = (b_q.to(tl.float32) * decay).to(b_k.dtype)
            found = tl.dot(k_near, tl.trans(k_near), input_precision=PRECISION)
            products += tl.where(pairs, found, 0.0)
            found = tl.dot(q_near, tl.trans(k_near), input_precision=PRECISION)
            scores += tl.where(pairs, found, 0.0)

    at_t = by_head * BT * BT + row[:, None] * BT + row[None, :]
    scores += tl.where(row[:, None] == row[None, :], own[:, None], 0.0)
    tl.store(attention + at_t, (scores * scale).to(attention.dtype.element_ty))
    b_beta = tl.load(rates + by_head * BT + row)
    b_inverse = unit_lower_inverse(products * b_beta[:, None], BT, PRECISION)
    live = row < length - chunk * BT
    tl.store(inverse + at_t, tl.where(live[:, None], b_inverse, 0.0).to(inverse.dtype.element_ty))
