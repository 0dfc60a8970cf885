"""The serial part: the state's walk over the chunks, forwards and, for the gradients, backwards.

The state is held transposed, S' = S^T [V, K]. Then every product of a step has the tensor that the step has just
computed as its left operand and a tile fresh from memory as its right one, so the chain

    S' -> (V - exp(G) K S)' -> V_new' -> S'

stays in registers: nothing computed is sent through shared memory.

A program holds BV rows of S' and all of K. The kernels do not know which gate they serve. With one gate a head
(GATE 1) or none (GATE 0) `k_in`, `k_out` and `q_in` are k, k and q and the decays are factors of rows; with a gate a
channel (GATE 2) they are k exp(G), k exp(G_end - G) and scale q exp(G), prepared outside.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.common.chunks import locate_sequence


@triton.jit
def decays(cumulative, row, left, BT: tl.constexpr):
    """exp(G), exp(G_end - G) of the rows of a chunk and exp(G_end), from G in units of log2 at `cumulative`.

    G does not move after the sequence's last token, hence G_end = min over the live rows (no gate is positive).
    """
    total = tl.load(cumulative + tl.minimum(BT, left) - 1)
    b_g = tl.load(cumulative + row, mask=row < left, other=0.0)
    return tl.exp2(b_g), tl.exp2(tl.where(row < left, total - b_g, 0.0)), tl.exp2(total)


@triton.jit(do_not_specialize=["T", "total"])
def scan_forward_kernel(
    q_in,  # [total, H or HV, K]; only if OUTPUT
    k_in,  # [total, H or HV, K]
    k_out,  # [total, H or HV, K]
    v,  # [total, HV, V]
    rates,  # [HV, total] fp32: beta
    cumulative,  # GATE 1: [HV, total] fp32, log2 units
    ends,  # GATE 2: [chunks, HV, K] fp32: exp(G_end)
    inverse,  # [total, HV, BT]
    attention,  # [total, HV, BT]; only if OUTPUT
    o,  # [total, HV, V] out, if OUTPUT
    states,  # [chunks, HV, V, K] out, if KEEP: S' at the start of each chunk
    v_new,  # [total, HV, V] out, if KEEP
    initial,  # [N, HV, K, V] fp32 or None
    final,  # [N, HV, K, V] fp32 out or None
    cu_seqlens,
    offsets,
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
    GATE: tl.constexpr,
    OUTPUT: tl.constexpr,
    KEEP: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The V-blocks of one head are neighbours in the grid, because they read the same k, q and tiles.
    NV: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    i_v = program % NV
    hv = (program // NV) % HV
    n = program // (NV * HV)
    h = hv if GATE == 2 else hv // (HV // H)
    HK: tl.constexpr = HV if GATE == 2 else H
    begin, length, slot = locate_sequence(n, cu_seqlens, offsets, T, BT, PACKED)

    row = tl.arange(0, BT)
    channel = tl.arange(0, BK)
    value = i_v * BV + tl.arange(0, BV)
    at_k = row[:, None] * (HK * K) + channel[None, :]
    at_v = value[:, None] + row[None, :] * (HV * V)
    at_t = row[:, None] * (HV * BT) + row[None, :]
    at_s = value[:, None] * K + channel[None, :]
    mask_s = (value < V)[:, None] & (channel < K)[None, :]

    k_in += (begin * HK + h) * K
    k_out += (begin * HK + h) * K
    v += (begin * HV + hv) * V
    rates += hv * tl.cast(total, tl.int64) + begin
    inverse += (begin * HV + hv) * BT
    if GATE == 1:
        cumulative += hv * tl.cast(total, tl.int64) + begin
    if GATE == 2:
        ends += (slot * HV + hv) * K
    if OUTPUT:
        q_in += (begin * HK + h) * K
        attention += (begin * HV + hv) * BT
        o += (begin * HV + hv) * V
    if KEEP:
        states += (slot * HV + hv) * K * V
        v_new += (begin * HV + hv) * V

    state = tl.zeros([BV, BK], dtype=tl.float32)
    at_boundary = (tl.cast(n, tl.int64) * HV + hv) * K * V + channel[None, :] * V + value[:, None]
    if INITIAL:
        state += tl.load(initial + at_boundary, mask=mask_s, other=0.0).to(tl.float32)

    for i in range(tl.cdiv(length, BT)):
        left = length - i * BT
        live = row < left
        mask_k = live[:, None] & (channel < K)[None, :]
        mask_v = (value < V)[:, None] & live[None, :]
        b_k = tl.load(k_in + at_k, mask=mask_k, other=0.0)
        b_v = tl.load(v + at_v, mask=mask_v, other=0.0)
        b_inverse = tl.load(inverse + at_t, mask=live[:, None], other=0.0)
        b_beta = tl.load(rates + row, mask=live, other=0.0)
        if GATE == 1:
            from_start, to_end, whole = decays(cumulative, row, left, BT)

        b_state = state.to(b_k.dtype)
        if KEEP:
            tl.store(states + at_s, b_state.to(states.dtype.element_ty), mask=mask_s)
        seen = tl.dot(b_state, tl.trans(b_k), input_precision=PRECISION)
        if GATE == 1:
            seen *= from_start[None, :]
        error = (b_v.to(tl.float32) - seen) * b_beta[None, :]
        new = tl.dot(error.to(b_k.dtype), tl.trans(b_inverse), input_precision=PRECISION)
        b_new = new.to(b_k.dtype)
        if KEEP:
            tl.store(v_new + at_v, b_new.to(v_new.dtype.element_ty), mask=mask_v)
            v_new += BT * HV * V
            states += HV * K * V
        if OUTPUT:
            b_q = tl.load(q_in + at_k, mask=mask_k, other=0.0)
            b_attention = tl.load(attention + at_t, mask=live[:, None], other=0.0)
            out = tl.dot(b_state, tl.trans(b_q), input_precision=PRECISION)
            if GATE == 1:
                out *= from_start[None, :]
            if GATE != 2:
                out *= scale
            out = tl.dot(b_new, tl.trans(b_attention), acc=out, input_precision=PRECISION)
            tl.store(o + at_v, out.to(o.dtype.element_ty), mask=mask_v)
            q_in += BT * HK * K
            attention += BT * HV * BT
            o += BT * HV * V

        if GATE == 1:
            state *= whole
            b_new = (new * to_end[None, :]).to(b_k.dtype)
            cumulative += BT
        if GATE == 2:
            state *= tl.load(ends + channel, mask=channel < K, other=0.0)[None, :]
            b_k = tl.load(k_out + at_k, mask=mask_k, other=0.0)
            ends += HV * K
            k_out += BT * HK * K
        state = tl.dot(b_new, b_k, acc=state, input_precision=PRECISION)

        k_in += BT * HK * K
        v += BT * HV * V
        rates += BT
        inverse += BT * HV * BT

    if FINAL:
        tl.store(final + at_boundary, state, mask=mask_s)


@triton.jit(do_not_specialize=["T", "total"])
def scan_backward_kernel(
    q_in,
    k_in,
    k_out,
    do,  # [total, HV, V]
    rates,
    cumulative,
    ends,
    inverse,
    attention,
    d_states,  # [chunks, HV, V, K] out: gradient of S' at the END of each chunk
    d_error,  # [total, HV, V] out: gradient of beta (V - exp(G) K S), the right-hand side of the triangular system
    d_final,  # [N, HV, K, V] fp32 or None
    d_initial,  # [N, HV, K, V] fp32 out or None
    cu_seqlens,
    offsets,
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
    GATE: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the last chunk to the first, per chunk:

    dV_new = attention^T dO + exp(G_end - G) K dS;   X = inverse^T dV_new   (written as d_error)
    dS    <- exp(G_end) dS + (scale exp(G) Q)^T dO - (beta exp(G) K)^T X
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    i_v = program % NV
    hv = (program // NV) % HV
    n = program // (NV * HV)
    h = hv if GATE == 2 else hv // (HV // H)
    HK: tl.constexpr = HV if GATE == 2 else H
    begin, length, slot = locate_sequence(n, cu_seqlens, offsets, T, BT, PACKED)

    row = tl.arange(0, BT)
    channel = tl.arange(0, BK)
    value = i_v * BV + tl.arange(0, BV)
    at_k = row[:, None] * (HK * K) + channel[None, :]
    at_v = value[:, None] + row[None, :] * (HV * V)
    at_t = row[:, None] * (HV * BT) + row[None, :]
    at_s = value[:, None] * K + channel[None, :]
    mask_s = (value < V)[:, None] & (channel < K)[None, :]

    chunks = tl.cdiv(length, BT)
    last = tl.cast(chunks, tl.int64) - 1  # an empty sequence never enters the loop, so -1 is harmless
    start = begin + last * BT
    q_in += (start * HK + h) * K
    k_in += (start * HK + h) * K
    k_out += (start * HK + h) * K
    do += (start * HV + hv) * V
    d_error += (start * HV + hv) * V
    rates += hv * tl.cast(total, tl.int64) + start
    inverse += (start * HV + hv) * BT
    attention += (start * HV + hv) * BT
    d_states += ((slot + last) * HV + hv) * K * V
    if GATE == 1:
        cumulative += hv * tl.cast(total, tl.int64) + start
    if GATE == 2:
        ends += ((slot + last) * HV + hv) * K

    d_state = tl.zeros([BV, BK], dtype=tl.float32)
    at_boundary = (tl.cast(n, tl.int64) * HV + hv) * K * V + channel[None, :] * V + value[:, None]
    if FINAL:
        d_state += tl.load(d_final + at_boundary, mask=mask_s, other=0.0).to(tl.float32)

    for i in range(chunks):
        left = length - (chunks - 1 - i) * BT
        live = row < left
        mask_k = live[:, None] & (channel < K)[None, :]
        mask_v = (value < V)[:, None] & live[None, :]
        b_k = tl.load(k_out + at_k, mask=mask_k, other=0.0)
        b_q = tl.load(q_in + at_k, mask=mask_k, other=0.0)
        b_do = tl.load(do + at_v, mask=mask_v, other=0.0)
        b_inverse = tl.load(inverse + at_t, mask=live[:, None], other=0.0)
        b_attention = tl.load(attention + at_t, mask=live[:, None], other=0.0)
        b_beta = tl.load(rates + row, mask=live, other=0.0)
        if GATE == 1:
            from_start, to_end, whole = decays(cumulative, row, left, BT)

        b_d_state = d_state.to(b_k.dtype)
        tl.store(d_states + at_s, b_d_state.to(d_states.dtype.element_ty), mask=mask_s)
        d_new = tl.dot(b_d_state, tl.trans(b_k), input_precision=PRECISION)
        if GATE == 1:
            d_new *= to_end[None, :]
        d_new = tl.dot(b_do, b_attention, acc=d_new, input_precision=PRECISION)
        x = tl.dot(d_new.to(b_k.dtype), b_inverse, input_precision=PRECISION)
        tl.store(d_error + at_v, x.to(d_error.dtype.element_ty), mask=mask_v)

        if GATE == 0:
            b_do = (b_do.to(tl.float32) * scale).to(b_k.dtype)
            x *= b_beta[None, :]
        if GATE == 1:
            b_do = (b_do.to(tl.float32) * (from_start * scale)[None, :]).to(b_k.dtype)
            x *= (b_beta * from_start)[None, :]
            d_state *= whole
            cumulative -= BT
        if GATE == 2:
            x *= b_beta[None, :]
            d_state *= tl.load(ends + channel, mask=channel < K, other=0.0)[None, :]
            b_k = tl.load(k_in + at_k, mask=mask_k, other=0.0)
            ends -= HV * K
            k_in -= BT * HK * K
        d_state = tl.dot(b_do, b_q, acc=d_state, input_precision=PRECISION)
        d_state = tl.dot((-x).to(b_k.dtype), b_k, acc=d_state, input_precision=PRECISION)

        k_out -= BT * HK * K
        q_in -= BT * HK * K
        do -= BT * HV * V
        d_error -= BT * HV * V
        d_states -= HV * K * V
        rates -= BT
        inverse -= BT * HV * BT
        attention -= BT * HV * BT

    if INITIAL:
        tl.store(d_initial + at_boundary, d_state, mask=mask_s)
