"""The serial part: the state at every chunk boundary, forward in time, and its gradient, backward in time.

    forward   S  <- e^(G_C) S  + (k e^(G_C - G))^T v      stored before the update: the state at the chunk's start
    reverse   dS <- e^(G_C) dS + (scale q e^G)^T do       stored before the update: the gradient at the chunk's end

Both are one kernel. A program owns a BK x BV tile of one head's state, which never leaves its registers (fp32).

Few heads and long sequences leave most of the device idle. Then each sequence is cut into segments: every segment is first
summarised by the state that it reaches from zero and by its total decay, the summaries are folded into each segment's true
start, and all segments are scanned again, now storing. That is the LASP-2 scheme (arXiv:2502.07563) inside one device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.common.chunks import locate_sequence
from kernels.common.tiles import die_order


@triton.jit(do_not_specialize=["T", "scale", "segments"])
def scan_kernel(
    a, b, gates, start, states, last, decays, cu_seqlens, offsets, scale, T, segments,
    HA: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr,
    HAS_START: tl.constexpr, HAS_LAST: tl.constexpr, SUMMARY: tl.constexpr, PACKED: tl.constexpr,
    DIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a [tokens, HA, K]: k or q; for a channel gate (GATE 2) the prepared kg or qg. b [tokens, HV, V]: v or do.

    gates: None (GATE 0), G [tokens, HV] (GATE 1) or decay [slots, HV, K] (GATE 2). start, last fp32
    [N, HV, segments, K, V]; states [slots, HV, K, V]. SUMMARY: states are not stored, but the segment's total decay is,
    in decays [N, HV, segments, K]. Grid: sequences x HV x segments x K tiles x V tiles, V tiles fastest.
    """
    blocks_v: tl.constexpr = (V + BV - 1) // BV
    blocks_k: tl.constexpr = (K + BK - 1) // BK
    pid = die_order(tl.program_id(0), tl.num_programs(0), blocks_v * blocks_k, DIES)
    vs = pid % blocks_v * BV + tl.arange(0, BV)
    ks = pid // blocks_v % blocks_k * BK + tl.arange(0, BK)
    part = pid // (blocks_v * blocks_k)
    head = part // segments
    hv = head % HV
    begin, length, first = locate_sequence(head // HV, cu_seqlens, offsets, T, BT, PACKED)
    row = tl.arange(0, BT)
    tile = ks[:, None] * V + vs[None, :]
    tile_mask = (ks < K)[:, None] & (vs < V)[None, :]
    a += (begin * HA + hv // (HV // HA)) * K
    b += (begin * HV + hv) * V
    states += (first * HV + hv) * (K * V)
    if GATE == 1:
        gates += begin * HV + hv
    if GATE == 2:
        gates += (first * HV + hv) * K
    S = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_START:
        S += tl.load(start + tl.cast(part, tl.int64) * (K * V) + tile, mask=tile_mask, other=0.0)
    count = tl.cdiv(length, BT)
    share = tl.cdiv(count, segments)
    low = tl.minimum(part % segments * share, count)
    high = tl.minimum(low + share, count)
    if SUMMARY:
        decay = tl.full([BK], 1.0, dtype=tl.float32)
    for step in range(high - low):
        chunk = tl.cast(low + step, tl.int64)
        if REVERSE:
            chunk = tl.cast(high - 1 - step, tl.int64)
        rows = tl.minimum(length - chunk * BT, BT).to(tl.int32)
        valid = row < rows
        if not SUMMARY:
            tl.store(states + chunk * (HV * K * V) + tile, S.to(states.dtype.element_ty), mask=tile_mask)
        a_chunk = a + chunk * (BT * HA * K)
        b_chunk = b + chunk * (BT * HV * V)
        b_a = tl.load(
            a_chunk + ks[:, None] + row[None, :] * (HA * K), mask=(ks < K)[:, None] & valid[None, :], other=0.0
        )
        b_b = tl.load(
            b_chunk + row[:, None] * (HV * V) + vs[None, :], mask=valid[:, None] & (vs < V)[None, :], other=0.0
        )
        if GATE == 1:
            G_chunk = gates + chunk * (BT * HV)
            G = tl.load(G_chunk + row * HV, mask=valid, other=0.0)
            G_last = tl.load(G_chunk + (rows - 1) * HV)
            S *= tl.exp2(G_last)
            if SUMMARY:
                decay *= tl.exp2(G_last)
            weight = tl.exp2(G) * scale if REVERSE else tl.exp2(G_last - G)
            b_a = (b_a.to(tl.float32) * weight[None, :]).to(b_a.dtype)
        elif GATE == 2:
            factor = tl.load(gates + chunk * (HV * K) + ks, mask=ks < K, other=0.0)
            S *= factor[:, None]
            if SUMMARY:
                decay *= factor
        elif REVERSE:
            b_a = (b_a.to(tl.float32) * scale).to(b_a.dtype)
        S = tl.dot(b_a, b_b, S, input_precision=PRECISION)
    if HAS_LAST:
        tl.store(last + tl.cast(part, tl.int64) * (K * V) + tile, S, mask=tile_mask)
    if SUMMARY:
        tl.store(decays + tl.cast(part, tl.int64) * K + ks, decay, mask=ks < K)


@triton.jit(do_not_specialize=["segments"])
def fold_kernel(
    summaries, decays, start, last, segments, REVERSE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK: tl.constexpr, HAS_START: tl.constexpr, HAS_LAST: tl.constexpr,
):  # fmt: skip
    """Replaces each segment's summary [N, HV, segments, K, V] by the state that enters it.

    start, last fp32 [N, HV, K, V]: what enters the first segment, what leaves the last one. Grid: heads x tiles of K V.
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = (K * V + BLOCK - 1) // BLOCK
    head = tl.cast(pid // blocks, tl.int64)
    at = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = at < K * V
    S = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_START:
        S += tl.load(start + head * (K * V) + at, mask=mask, other=0.0)
    for step in range(segments):
        segment = tl.cast(step, tl.int64)
        if REVERSE:
            segment = tl.cast(segments - 1 - step, tl.int64)
        part = head * segments + segment
        summary = tl.load(summaries + part * (K * V) + at, mask=mask, other=0.0)
        decay = tl.load(decays + part * K + at // V, mask=mask, other=0.0)
        tl.store(summaries + part * (K * V) + at, S, mask=mask)
        S = decay * S + summary
    if HAS_LAST:
        tl.store(last + head * (K * V) + at, S, mask=mask)
