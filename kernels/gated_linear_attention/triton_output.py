"""What a chunk reads from the state at its boundary and from its own tokens: the output, and the gradient of v.

    forward   o_i  = (scale q_i e^(G_i)) S      + sum_(j <= i) A_ij v_j
    reverse   dv_j = (k_j e^(G_C - G_j)) dS     + sum_(i >= j) A_ij do_i

Both are one kernel; chunks are independent. For a scalar gate A_ij = scale (q_i . k_j) exp(G_i - G_j) is computed here; the
reverse computes its transpose from k q^T, because transposing a product's accumulator would go through shared memory (and
was miscompiled for Hopper by Triton 3.4 to 3.7.0).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.common.chunks import locate_chunk
from kernels.common.tiles import die_order


@triton.jit
def scalar_decay(G_row, G_column, row, column, rows, GATE: tl.constexpr, REVERSE: tl.constexpr):
    """exp of the decay between the tokens of a pair, 0 where the pair is not causal or not there. [BT, BT], fp32.

    Rows are the later tokens, or in REVERSE the earlier ones. The exponent is masked before exp: above the diagonal it
    would overflow, and inf * 0 is NaN.
    """
    if REVERSE:
        causal = (row[:, None] <= column[None, :]) & (column < rows)[None, :]
    else:
        causal = (row[:, None] >= column[None, :]) & (row < rows)[:, None]
    if GATE == 1:
        distance = G_column[None, :] - G_row[:, None] if REVERSE else G_row[:, None] - G_column[None, :]
        return tl.exp2(tl.where(causal, distance, float("-inf")))
    return tl.where(causal, 1.0, 0.0)


@triton.jit(do_not_specialize=["T", "scale"])
def output_kernel(
    a, other, b, G, A, states, out, cu_seqlens, indices, scale, T,
    HA: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
    DIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a [tokens, HA, K]: q (reverse: k), for a channel gate the prepared qg (kg); other: k (q), unused for a channel gate.

    b [tokens, HV, V]: v (do); G [tokens, HV] for a scalar gate; A [tokens, HV, BT] for a channel gate; states
    [slots, HV, K, V]; out [tokens, HV, V]. Grid: slots x HV x V tiles, V tiles fastest.
    """
    blocks_v: tl.constexpr = (V + BV - 1) // BV
    pid = die_order(tl.program_id(0), tl.num_programs(0), blocks_v * (HV // HA), DIES)
    vs = pid % blocks_v * BV + tl.arange(0, BV)
    hv = pid // blocks_v % HV
    slot = pid // (blocks_v * HV)
    sequence, chunk, begin, length = locate_chunk(slot, cu_seqlens, indices, T, BT, PACKED)
    if sequence >= 0:
        token = begin + chunk * BT
        rows = tl.minimum(length - chunk * BT, BT)
        row = tl.arange(0, BT)
        valid = row < rows
        a += (token * HA + hv // (HV // HA)) * K
        other += (token * HA + hv // (HV // HA)) * K
        b += (token * HV + hv) * V
        out += (token * HV + hv) * V
        states += (tl.cast(slot, tl.int64) * HV + hv) * (K * V)
        accumulator = tl.zeros([BT, BV], dtype=tl.float32)
        scores = tl.zeros([BT, BT], dtype=tl.float32)
        for block in range((K + BK - 1) // BK):
            ks = block * BK + tl.arange(0, BK)
            mask = valid[:, None] & (ks < K)[None, :]
            x = tl.load(a + row[:, None] * (HA * K) + ks[None, :], mask=mask, other=0.0)
            mask = (ks < K)[:, None] & (vs < V)[None, :]
            S = tl.load(states + ks[:, None] * V + vs[None, :], mask=mask, other=0.0)
            accumulator = tl.dot(x.to(S.dtype), S, accumulator, input_precision=PRECISION)
            if GATE != 2:
                mask = (ks < K)[:, None] & valid[None, :]
                y = tl.load(other + ks[:, None] + row[None, :] * (HA * K), mask=mask, other=0.0)
                scores = tl.dot(x, y, scores, input_precision=PRECISION)
        values = tl.load(b + row[:, None] * (HV * V) + vs[None, :], mask=valid[:, None] & (vs < V)[None, :], other=0.0)
        if GATE == 2:
            A += (token * HV + hv) * BT
            if REVERSE:
                pair = row[None, :] * (HV * BT) + row[:, None]
                weights = tl.load(A + pair, mask=valid[None, :], other=0.0)
            else:
                pair = row[:, None] * (HV * BT) + row[None, :]
                weights = tl.load(A + pair, mask=valid[:, None], other=0.0)
        else:
            b_G = row * 0.0
            if GATE == 1:
                G += token * HV + hv
                b_G = tl.load(G + row * HV, mask=valid, other=0.0)
                if REVERSE:
                    accumulator *= tl.exp2(tl.load(G + (rows - 1) * HV) - b_G)[:, None]
                else:
                    accumulator *= tl.exp2(b_G)[:, None]
            if not REVERSE:
                accumulator *= scale
            scores *= scalar_decay(b_G, b_G, row, row, rows, GATE, REVERSE) * scale
            weights = scores.to(values.dtype)
        accumulator = tl.dot(weights, values, accumulator, input_precision=PRECISION)
        mask = valid[:, None] & (vs < V)[None, :]
        tl.store(out + row[:, None] * (HV * V) + vs[None, :], accumulator.to(out.dtype.element_ty), mask=mask)
