"""Everything inside one chunk that does not touch the state, for no gate or one gate a head.

Per chunk of BT tokens and value head, with G the inclusive sum of the log decays inside the chunk:

    P_ij = k_i·k_j exp(G_i - G_j)  (i > j)      inverse   = (I + stril(beta_i P_ij))^-1
                                                attention = tril(scale q_i·k_j exp(G_i - G_j))

These two tiles leave the kernel, and q and k in the order of the chunks. The usual W = inverse (beta exp(G) K) and
U = inverse (beta V) are never formed: the scan computes V_new = inverse (beta (V - exp(G) K S)) instead, which costs one
more small product per step of the scan and saves writing, reading and keeping two tensors as large as k and v.

Everything written is laid out by chunk slot (see kernels/common/chunks.py) and filled up: rows beyond the sequence hold
zeros (G: its last value), columns beyond K hold zeros. The scans then read whole tiles and need no masks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.common.chunks import locate_chunk
from kernels.common.tiles import die_order_rows
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


@triton.jit(do_not_specialize=["T"])
def prepare_kernel(
    q,  # [total, H, K]
    k,  # [total, H, K]
    beta,  # [total, HV]
    g,  # [total, HV] natural log, or None
    q_in,  # [slots, H, BT, BK] out: q, of unit length if NORMALIZE
    k_in,
    q_factor,  # [slots, H, BT] fp32 out, if NORMALIZE: 1 / length of each row of q
    k_factor,
    rates,  # [slots, HV, BT] fp32 out: beta
    cumulative,  # [slots, HV, BT] fp32 out: G in units of log2
    inverse,  # [slots, HV, BT, BT] out
    attention,  # [slots, HV, BT, BT] out
    cu_seqlens,
    indices,
    scale,
    T,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,  # channels at a time
    GATED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr,
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
    by_key_head = tl.cast(slot, tl.int64) * H + h
    by_head = tl.cast(slot, tl.int64) * HV + hv

    row = tl.arange(0, BT)
    live = row < left
    column = tl.arange(0, BK)
    k += (first * H + h) * K
    q += (first * H + h) * K
    at_k = row[:, None] * (H * K) + column[None, :]
    mask_k = live[:, None] & (column < K)[None, :]
    b_k = tl.load(k + at_k, mask=mask_k, other=0.0)
    b_q = tl.load(q + at_k, mask=mask_k, other=0.0)
    if NORMALIZE:
        k_hat, k_scale = unit_rows(b_k.to(tl.float32))
        q_hat, q_scale = unit_rows(b_q.to(tl.float32))
        b_k = k_hat.to(b_k.dtype)
        b_q = q_hat.to(b_q.dtype)
    if hv % (HV // H) == 0:
        at_in = by_key_head * BT * BK + row[:, None] * BK + column[None, :]
        tl.store(k_in + at_in, b_k)
        tl.store(q_in + at_in, b_q)
        if NORMALIZE:
            tl.store(k_factor + by_key_head * BT + row, k_scale)
            tl.store(q_factor + by_key_head * BT + row, q_scale)

    b_beta = tl.load(beta + first * HV + hv + row * HV, mask=live, other=0.0).to(tl.float32)
    tl.store(rates + by_head * BT + row, b_beta)

    lower = row[:, None] > row[None, :]
    upper = row[:, None] < row[None, :]
    # The rows are read again, some channels at a time: all at once they would be held in registers beside the products.
    products = tl.zeros([BT, BT], dtype=tl.float32)
    scores = tl.zeros([BT, BT], dtype=tl.float32)
    for start in range(0, BK, BC):
        some = start + tl.arange(0, BC)
        at_some = row[:, None] * (H * K) + some[None, :]
        mask_some = live[:, None] & (some < K)[None, :]
        some_k = tl.load(k + at_some, mask=mask_some, other=0.0)
        some_q = tl.load(q + at_some, mask=mask_some, other=0.0)
        if NORMALIZE:
            some_k = (some_k.to(tl.float32) * k_scale[:, None]).to(some_k.dtype)
            some_q = (some_q.to(tl.float32) * q_scale[:, None]).to(some_q.dtype)
        products = tl.dot(some_k, tl.trans(some_k), acc=products, input_precision=PRECISION)
        scores = tl.dot(some_q, tl.trans(some_k), acc=scores, input_precision=PRECISION)
    scores *= scale
    if GATED:
        b_g = tl.load(g + first * HV + hv + row * HV, mask=live, other=0.0).to(tl.float32)
        b_g = tl.cumsum(tl.maximum(b_g * LOG2E, LOWEST), axis=0)
        tl.store(cumulative + by_head * BT + row, b_g)
        # The exponent is masked, not the result: above the diagonal it is positive and may overflow.
        decay = tl.exp2(tl.where(lower, b_g[:, None] - b_g[None, :], 0.0))
        products *= decay
        scores *= decay

    at_t = by_head * BT * BT + row[:, None] * BT + row[None, :]
    tl.store(attention + at_t, tl.where(upper, 0.0, scores).to(attention.dtype.element_ty))
    b_inverse = unit_lower_inverse(tl.where(lower, products * b_beta[:, None], 0.0), BT, PRECISION)
    # Rows beyond the sequence are zeroed, so that nothing the scans read for them from the next sequence counts.
    tl.store(inverse + at_t, tl.where(live[:, None], b_inverse, 0.0).to(inverse.dtype.element_ty))
