"""What the gates contribute before any state is known: cumulative decays, and for a channel gate the decayed operands.

Cumulative gates G are inclusive sums inside a chunk, fp32, in units of log2, so that the kernels use exp2.

A channel gate does not factor out of q_i . k_j, and exp(-G) overflows. Every pair (i, j) of a chunk with i > j differs in a
highest bit: i lies in the upper and j in the lower half of one aligned block of 2^(bit + 1) tokens. With the block's first
upper token r as reference, exp(G_i - G_j) = exp(G_i - G_r) exp(G_r - G_j), both exponents <= 0. So the score matrix is the
diagonal plus log2(BT) masked matrix products, with one exponential per token, channel and level. That is the secondary
chunking of Gated Linear Attention (arXiv:2312.06635, section 4.3) carried down to single tokens: the 16 x 16 blocks
computed there pair by pair would need 16 exponentials per token and channel, and no matrix unit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.common.chunks import locate_chunk
from kernels.common.tiles import die_order

# Natural log per step below which a decay is nothing in fp32 (exp(-100) < 2^-126). Clamping keeps g = -inf out of the
# differences of cumulative gates, where -inf - -inf would be NaN.
FLOOR = tl.constexpr(-100.0)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["T"])
def cumulative_gate_kernel(
    g, G, cu_seqlens, indices, T,
    S: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """G = inclusive cumulative sum of g / ln 2 inside each chunk. g, G [tokens, S], S = HV or HV K. Grid: slots x S tiles."""
    pid = tl.program_id(0)
    blocks: tl.constexpr = (S + BS - 1) // BS
    sequence, chunk, begin, length = locate_chunk(pid // blocks, cu_seqlens, indices, T, BT, PACKED)
    if sequence >= 0:
        s = (pid % blocks) * BS + tl.arange(0, BS)
        row = tl.arange(0, BT)
        base = (begin + chunk * BT) * S
        mask = (row < length - chunk * BT)[:, None] & (s < S)[None, :]
        value = tl.load(g + base + row[:, None] * S + s[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.cumsum(tl.maximum(value, FLOOR) * LOG2E, axis=0)
        tl.store(G + base + row[:, None] * S + s[None, :], value, mask=mask)


@triton.jit
def level_factors(G, G_chunk, row, k, rows, level, HV: tl.constexpr, K: tl.constexpr):
    """Of one level: (is the token in an upper half [BT], exp2 of minus the distance to its block's reference [BT, BK]).

    G [BT, BK]: the tile; G_chunk: pointer to its first row; k: its channels; rows: valid tokens.
    """
    half = 1 << level
    reference = tl.minimum((row >> (level + 1) << (level + 1)) + half, rows - 1)
    at = tl.load(G_chunk + reference[:, None] * (HV * K) + k[None, :], mask=(k < K)[None, :], other=0.0)
    return (row & half) != 0, tl.exp2(-tl.abs(G - at))


@triton.jit
def level_pairs(row, level):
    """Pairs of tokens [BT, BT] in the two halves of one block of the level: those whose highest unequal bit it is."""
    block = (
        row >> level
    )  # shifted before the pairs are formed: xor first is invariant over levels and held in registers
    return (block[:, None] ^ block[None, :]) == 1


@triton.jit(do_not_specialize=["T", "scale"])
def prepare_kernel(
    q, k, G, qg, kg, decay, A, cu_seqlens, indices, scale, T,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr,
    SCORES: tl.constexpr, PACKED: tl.constexpr, DIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Channel gate. qg = scale q e^G, kg = k e^(G_C - G) [tokens, HV, K]; decay = e^(G_C) [slots, HV, K], fp32.

    SCORES: also A_ij = scale sum_k q_ik k_jk exp(G_ik - G_jk) for i >= j, else 0 [tokens, HV, BT]. Grid: slots x HV.
    """
    pid = die_order(tl.program_id(0), tl.num_programs(0), HV // H, DIES)
    slot = pid // HV
    hv = pid % HV
    sequence, chunk, begin, length = locate_chunk(slot, cu_seqlens, indices, T, BT, PACKED)
    if sequence >= 0:
        token = begin + chunk * BT
        rows = tl.minimum(length - chunk * BT, BT)
        q += (token * H + hv // (HV // H)) * K
        k += (token * H + hv // (HV // H)) * K
        G += (token * HV + hv) * K
        qg += (token * HV + hv) * K
        kg += (token * HV + hv) * K
        decay += (tl.cast(slot, tl.int64) * HV + hv) * K
        row = tl.arange(0, BT)
        scores = tl.zeros([BT, BT], dtype=tl.float32)
        for block in range((K + BK - 1) // BK):
            ks = block * BK + tl.arange(0, BK)
            mask = (row < rows)[:, None] & (ks < K)[None, :]
            b_q = tl.load(q + row[:, None] * (H * K) + ks[None, :], mask=mask, other=0.0)
            b_k = tl.load(k + row[:, None] * (H * K) + ks[None, :], mask=mask, other=0.0)
            b_G = tl.load(G + row[:, None] * (HV * K) + ks[None, :], mask=mask, other=0.0)
            last = tl.load(G + (rows - 1) * (HV * K) + ks, mask=ks < K, other=0.0)
            at = row[:, None] * (HV * K) + ks[None, :]
            left = b_q.to(tl.float32) * tl.exp2(b_G) * scale
            tl.store(qg + at, left.to(qg.dtype.element_ty), mask=mask)
            right = b_k.to(tl.float32) * tl.exp2(last[None, :] - b_G)
            tl.store(kg + at, right.to(kg.dtype.element_ty), mask=mask)
            tl.store(decay + ks, tl.exp2(last), mask=ks < K)
            if SCORES:
                diagonal = tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32), axis=1)
                scores += tl.where(row[:, None] == row[None, :], diagonal[:, None], 0.0)
                for level in tl.range(LEVELS, num_stages=1):
                    upper, factor = level_factors(b_G, G, row, ks, rows, level, HV, K)
                    # A token is a query in upper halves and a key in lower ones, so that one operand holds both.
                    x = (tl.where(upper[:, None], b_q, b_k).to(tl.float32) * factor).to(b_q.dtype)
                    product = tl.dot(x, tl.trans(x), input_precision=PRECISION)
                    scores += tl.where(level_pairs(row, level) & upper[:, None], product, 0.0)
        if SCORES:
            A += (token * HV + hv) * BT
            pointer = A + row[:, None] * (HV * BT) + row[None, :]
            tl.store(pointer, (scores * scale).to(A.dtype.element_ty), mask=(row < rows)[:, None])
