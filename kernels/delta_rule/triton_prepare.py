"""Everything inside one chunk that does not touch the state, for no gate or one gate a head.

Per chunk of BT tokens and value head, with G the inclusive sum of the log decays inside the chunk:

    P_ij = k_i·k_j exp(G_i - G_j)  (i > j)      inverse   = (I + stril(beta_i P_ij))^-1
                                                attention = tril(scale q_i·k_j exp(G_i - G_j))

Only these two tiles leave the kernel. The usual W = inverse (beta exp(G) K) and U = inverse (beta V) are never formed:
the scan computes V_new = inverse (beta (V - exp(G) K S)) instead, which costs one more small product per step of the
scan and saves writing, reading and keeping two tensors as large as k and v.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.common.chunks import locate_chunk
from kernels.common.triangular import unit_lower_inverse

# exp(g) is exp2(g log2(e)): the hardware has exp2 only, so cumulative gates are kept in units of log2.
LOG2E = tl.constexpr(1.4426950408889634)
# A gate of -inf erases the state. 2^-126 does as well, and differences of sums stay finite and exact to 1e-5.
LOWEST = tl.constexpr(-126.0)


@triton.jit
def unit_rows(x):
    """Rows of an fp32 tile scaled to unit length, and the factors. The 1e-6 keeps zero rows (and padding) zero."""
    factor = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) + 1e-6)
    return x * factor[:, None], factor


@triton.jit(do_not_specialize=["T", "total"])
def prepare_kernel(
    q,  # [total, H, K]
    k,  # [total, H, K]
    beta,  # [total, HV]
    g,  # [total, HV] natural log, or None
    q_unit,  # [total, H, K] out, if NORMALIZE
    k_unit,
    q_factor,  # [H, total] fp32 out, if NORMALIZE: 1 / length of each row of q
    k_factor,
    rates,  # [HV, total] fp32 out: beta, laid out so that the scan reads whole lines
    cumulative,  # [HV, total] fp32 out: G in units of log2
    inverse,  # [total, HV, BT] out
    attention,  # [total, HV, BT] out
    cu_seqlens,
    indices,
    scale,
    T,
    total,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    GATED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    hv = tl.program_id(0)
    sequence, chunk, begin, length = locate_chunk(tl.program_id(1), cu_seqlens, indices, T, BT, PACKED)
    if sequence < 0:
        return
    h = hv // (HV // H)
    left = length - chunk * BT
    first = begin + chunk * BT

    row = tl.arange(0, BT)
    live = row < left
    column = tl.arange(0, BK)
    at_k = row[:, None] * (H * K) + column[None, :]
    mask_k = live[:, None] & (column < K)[None, :]
    b_k = tl.load(k + (first * H + h) * K + at_k, mask=mask_k, other=0.0)
    b_q = tl.load(q + (first * H + h) * K + at_k, mask=mask_k, other=0.0)
    if NORMALIZE:
        k_hat, k_scale = unit_rows(b_k.to(tl.float32))
        q_hat, q_scale = unit_rows(b_q.to(tl.float32))
        b_k = k_hat.to(b_k.dtype)
        b_q = q_hat.to(b_q.dtype)
        if hv % (HV // H) == 0:
            tl.store(k_unit + (first * H + h) * K + at_k, b_k, mask=mask_k)
            tl.store(q_unit + (first * H + h) * K + at_k, b_q, mask=mask_k)
            tl.store(k_factor + h * tl.cast(total, tl.int64) + first + row, k_scale, mask=live)
            tl.store(q_factor + h * tl.cast(total, tl.int64) + first + row, q_scale, mask=live)

    b_beta = tl.load(beta + first * HV + hv + row * HV, mask=live, other=0.0).to(tl.float32)
    tl.store(rates + hv * tl.cast(total, tl.int64) + first + row, b_beta, mask=live)

    lower = row[:, None] > row[None, :]
    diagonal = row[:, None] == row[None, :]
    products = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
    scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    if GATED:
        b_g = tl.load(g + first * HV + hv + row * HV, mask=live, other=0.0).to(tl.float32)
        b_g = tl.cumsum(tl.maximum(b_g * LOG2E, LOWEST), axis=0)
        tl.store(cumulative + hv * tl.cast(total, tl.int64) + first + row, b_g, mask=live)
        # The exponent is masked, not the result: above the diagonal it is positive and may overflow.
        decay = tl.exp2(tl.where(lower, b_g[:, None] - b_g[None, :], 0.0))
        products *= decay
        scores *= decay

    at_t = row[:, None] * (HV * BT) + row[None, :]
    tile = (first * HV + hv) * BT
    b_attention = tl.where(lower | diagonal, scores, 0.0)
    tl.store(attention + tile + at_t, b_attention.to(attention.dtype.element_ty), mask=live[:, None])
    b_lower = tl.where(lower, products * b_beta[:, None], 0.0)
    b_inverse = unit_lower_inverse(b_lower, BT, PRECISION)
    tl.store(inverse + tile + at_t, b_inverse.to(inverse.dtype.element_ty), mask=live[:, None])
