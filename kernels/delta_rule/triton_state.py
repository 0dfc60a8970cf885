"""The serial part: the state's walk over the chunks, forwards and, for the gradients, backwards.

The state is held transposed, S' = S^T [V, K]. Then every product of a step has the tensor that the step has just
computed as its left operand and a tile fresh from memory as its right one, so the chain

    S' -> (V - exp(G) K S)' -> V_new' -> S'

stays in registers: nothing computed is sent through shared memory.

A program holds BV rows of S' and all of K. The kernels do not know which gate they serve. With one gate a head
(GATE 1) or none (GATE 0) `k_in`, `k_out` and `q_in` are k, k and q and the decays are factors of rows; with a gate a
channel (GATE 2) they are k exp(G), k exp(G_end - G) and scale q exp(G), prepared outside.

All tensors but v, o and do are laid out by chunk slot and filled up with zeros, see triton_prepare.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.common.chunks import locate_sequence
from kernels.common.tiles import die_order, load_tile, load_tile_masked, store_tile


@triton.jit(do_not_specialize=["T"])
def scan_forward_kernel(
    q_in,  # [slots, HK, BT, BK]; only if OUTPUT. HK is H, or HV if GATE 2
    k_in,  # [slots, HK, BT, BK]
    k_out,  # [slots, HK, BT, BK]; only if GATE 2
    v,  # [total, HV, V]
    rates,  # [slots, HV, BT] fp32: beta
    cumulative,  # GATE 1: [slots, HV, BT] fp32, log2 units
    ends,  # GATE 2: [slots, HV, BK] fp32: exp(G_end)
    inverse,  # [slots, HV, BT, BT]
    attention,  # [slots, HV, BT, BT]; only if OUTPUT
    o,  # [total, HV, V] out, if OUTPUT
    states,  # [slots, HV, V, BK] out, if KEEP: S' at the start of each chunk
    v_new,  # [slots, HV, V, BT] out, if KEEP: V_new'
    initial,  # [N, HV, K, V] or None
    final,  # [N, HV, K, V] fp32 out or None
    transition,  # [N, HV, K, K] fp32 out, if SUMMARY
    cu_seqlens,
    offsets,
    scale,
    T,
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
    SUMMARY: tl.constexpr,
    WHOLE: tl.constexpr,  # o is a descriptor too: every chunk is full
    PACKED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    DIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state is affine in the one a sequence starts with: S_end = transition S_start + S_end(from zero).

    With SUMMARY further programs compute the transition, by the same walk with v = 0 from the identity as the state.
    """
    # The V-blocks of one head are neighbours in the grid, because they read the same k, q and tiles.
    NV: tl.constexpr = (V + BV - 1) // BV
    BLOCKS: tl.constexpr = NV + (K + BV - 1) // BV if SUMMARY else NV
    HK: tl.constexpr = HV if GATE == 2 else H
    program = die_order(tl.program_id(0), tl.num_programs(0), BLOCKS * (HV // HK), DIES)
    i_v = program % BLOCKS
    hv = (program // BLOCKS) % HV
    n = program // (BLOCKS * HV)
    if SUMMARY:
        homogeneous = i_v >= NV
        i_v = tl.where(homogeneous, i_v - NV, i_v)
    h = hv if GATE == 2 else hv // (HV // H)
    begin, length, slot = locate_sequence(n, cu_seqlens, offsets, T, BT, PACKED)

    row = tl.arange(0, BT)
    channel = tl.arange(0, BK)
    value = i_v * BV + tl.arange(0, BV)
    at_k = row[:, None] * BK + channel[None, :]
    at_v = row[:, None] * (HV * V) + tl.arange(0, BV)[None, :]
    at_t = row[:, None] * BT + row[None, :]
    at_s = tl.arange(0, BV)[:, None] * BK + channel[None, :]
    at_new = tl.arange(0, BV)[:, None] * BT + row[None, :]
    inside = (value < V)[:, None]

    state = tl.zeros([BV, BK], dtype=tl.float32)
    at_boundary = (tl.cast(n, tl.int64) * HV + hv) * K * V + channel[None, :] * V + value[:, None]
    mask_boundary = inside & (channel < K)[None, :]
    if INITIAL:
        state += tl.load(initial + at_boundary, mask=mask_boundary, other=0.0).to(tl.float32)
    if SUMMARY:
        state += tl.where(homogeneous & (value[:, None] == channel[None, :]), 1.0, 0.0)

    for i in range(tl.cdiv(length, BT)):
        by_head = (slot + i) * HV + hv
        row_k = ((slot + i) * HK + h) * BT
        row_v = begin + i * BT
        live = row < length - i * BT
        mask_v = live[:, None] & (value < V)[None, :]
        b_k = load_tile(k_in, row_k, 0, at_k, BK, DESCRIPTOR)
        b_v = load_tile_masked(v, row_v, hv * V + i_v * BV, at_v, mask_v, HV * V, DESCRIPTOR)
        if SUMMARY:
            b_v = tl.where(homogeneous, 0.0, b_v)
        b_inverse = load_tile(inverse, by_head * BT, 0, at_t, BT, DESCRIPTOR)
        b_beta = tl.load(rates + by_head * BT + row)
        if GATE == 1:
            gate = tl.load(cumulative + by_head * BT + row)
            gate_end = tl.load(cumulative + by_head * BT + BT - 1)

        b_state = state.to(b_k.dtype)
        if KEEP:
            store_tile(states, by_head * V + i_v * BV, 0, at_s, b_state, inside, BK, DESCRIPTOR)
        seen = tl.dot(b_state, tl.trans(b_k), input_precision=PRECISION)
        if OUTPUT:
            b_q = load_tile(q_in, row_k, 0, at_k, BK, DESCRIPTOR)
            out = tl.dot(b_state, tl.trans(b_q), input_precision=PRECISION)
        if GATE == 1:
            seen *= tl.exp2(gate)[None, :]
        error = (tl.trans(b_v).to(tl.float32) - seen) * b_beta[None, :]
        new = tl.dot(error.to(b_k.dtype), tl.trans(b_inverse), input_precision=PRECISION)
        b_new = new.to(b_k.dtype)
        if KEEP:
            store_tile(v_new, by_head * V + i_v * BV, 0, at_new, b_new, inside, BT, DESCRIPTOR)
        if OUTPUT:
            if GATE == 1:
                out *= (tl.exp2(gate) * scale)[None, :]
            if GATE == 0:
                out *= scale
            b_attention = load_tile(attention, by_head * BT, 0, at_t, BT, DESCRIPTOR)
            out = tl.dot(b_new, tl.trans(b_attention), acc=out, input_precision=PRECISION)
            b_o = tl.trans(out.to(b_k.dtype))
            store_tile(o, row_v, hv * V + i_v * BV, at_v, b_o, mask_v, HV * V, WHOLE)

        if GATE == 1:
            state *= tl.exp2(gate_end)
            b_new = (new * tl.exp2(gate_end - gate)[None, :]).to(b_k.dtype)
        if GATE == 2:
            state *= tl.load(ends + by_head * BK + channel)[None, :]
            b_k = load_tile(k_out, row_k, 0, at_k, BK, DESCRIPTOR)
        state = tl.dot(b_new, b_k, acc=state, input_precision=PRECISION)

    if SUMMARY:
        tl.store(final + at_boundary, state, mask=mask_boundary & (homogeneous == 0))
        at_transition = (tl.cast(n, tl.int64) * HV + hv) * K * K + channel[None, :] * K + value[:, None]
        mask_transition = (value < K)[:, None] & (channel < K)[None, :] & homogeneous
        tl.store(transition + at_transition, state, mask=mask_transition)
    elif FINAL:
        tl.store(final + at_boundary, state, mask=mask_boundary)


@triton.jit(do_not_specialize=["T"])
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
    d_states,  # [slots, HV, V, BK] out, if KEEP: gradient of S' at the END of each chunk
    d_error,  # [slots, HV, V, BT] out, if KEEP: gradient of (beta (V - exp(G) K S))', the triangular right-hand side
    d_final,  # [N, HV, K, V] or None
    d_initial,  # [N, HV, K, V] fp32 out or None
    cu_seqlens,
    offsets,
    scale,
    T,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATE: tl.constexpr,
    KEEP: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    PACKED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    DIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the last chunk to the first, per chunk:

    dV_new = attention^T dO + exp(G_end - G) K dS;   X = inverse^T dV_new   (written as d_error)
    dS    <- exp(G_end) dS + (scale exp(G) Q)^T dO - (beta exp(G) K)^T X
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    HK: tl.constexpr = HV if GATE == 2 else H
    program = die_order(tl.program_id(0), tl.num_programs(0), NV * (HV // HK), DIES)
    i_v = program % NV
    hv = (program // NV) % HV
    n = program // (NV * HV)
    h = hv if GATE == 2 else hv // (HV // H)
    begin, length, slot = locate_sequence(n, cu_seqlens, offsets, T, BT, PACKED)

    row = tl.arange(0, BT)
    channel = tl.arange(0, BK)
    value = i_v * BV + tl.arange(0, BV)
    at_k = row[:, None] * BK + channel[None, :]
    at_v = row[:, None] * (HV * V) + tl.arange(0, BV)[None, :]
    at_t = row[:, None] * BT + row[None, :]
    at_s = tl.arange(0, BV)[:, None] * BK + channel[None, :]
    at_new = tl.arange(0, BV)[:, None] * BT + row[None, :]
    inside = (value < V)[:, None]

    d_state = tl.zeros([BV, BK], dtype=tl.float32)
    at_boundary = (tl.cast(n, tl.int64) * HV + hv) * K * V + channel[None, :] * V + value[:, None]
    mask_boundary = inside & (channel < K)[None, :]
    if FINAL:
        d_state += tl.load(d_final + at_boundary, mask=mask_boundary, other=0.0).to(tl.float32)

    chunks = tl.cdiv(length, BT)
    for step in range(chunks):
        i = chunks - 1 - step
        by_head = (slot + i) * HV + hv
        row_k = ((slot + i) * HK + h) * BT
        row_v = begin + i * BT
        live = row < length - i * BT
        mask_v = live[:, None] & (value < V)[None, :]
        b_k = load_tile(k_out if GATE == 2 else k_in, row_k, 0, at_k, BK, DESCRIPTOR)
        b_do = load_tile_masked(do, row_v, hv * V + i_v * BV, at_v, mask_v, HV * V, DESCRIPTOR)
        b_inverse = load_tile(inverse, by_head * BT, 0, at_t, BT, DESCRIPTOR)
        b_attention = load_tile(attention, by_head * BT, 0, at_t, BT, DESCRIPTOR)
        b_q = load_tile(q_in, row_k, 0, at_k, BK, DESCRIPTOR)
        b_beta = tl.load(rates + by_head * BT + row)
        if GATE == 1:
            gate = tl.load(cumulative + by_head * BT + row)
            gate_end = tl.load(cumulative + by_head * BT + BT - 1)

        b_d_state = d_state.to(b_k.dtype)
        if KEEP:
            store_tile(d_states, by_head * V + i_v * BV, 0, at_s, b_d_state, inside, BK, DESCRIPTOR)
        d_new = tl.dot(b_d_state, tl.trans(b_k), input_precision=PRECISION)
        if GATE == 1:
            d_new *= tl.exp2(gate_end - gate)[None, :]
        b_do = tl.trans(b_do)
        d_new = tl.dot(b_do, b_attention, acc=d_new, input_precision=PRECISION)
        x = tl.dot(d_new.to(b_k.dtype), b_inverse, input_precision=PRECISION)
        if KEEP:
            store_tile(d_error, by_head * V + i_v * BV, 0, at_new, x.to(b_k.dtype), inside, BT, DESCRIPTOR)

        if GATE == 1:
            from_start = tl.exp2(gate)
            b_do = (b_do.to(tl.float32) * (from_start * scale)[None, :]).to(b_k.dtype)
            x *= -(b_beta * from_start)[None, :]
            d_state *= tl.exp2(gate_end)
        else:
            x *= -b_beta[None, :]
        if GATE == 0:
            b_do = (b_do.to(tl.float32) * scale).to(b_k.dtype)
        if GATE == 2:
            d_state *= tl.load(ends + by_head * BK + channel)[None, :]
            b_k = load_tile(k_in, row_k, 0, at_k, BK, DESCRIPTOR)
        d_state = tl.dot(b_do, b_q, acc=d_state, input_precision=PRECISION)
        d_state = tl.dot(x.to(b_k.dtype), b_k, acc=d_state, input_precision=PRECISION)

    if INITIAL:
        tl.store(d_initial + at_boundary, d_state, mask=mask_boundary)
