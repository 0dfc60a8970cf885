"""Segments of a sequence, walked at the same time and joined afterwards.

A scan has one program per sequence, head and block of values; one long sequence with few heads leaves most of the device
idle. Over a segment the state is affine in the one it starts with, S_end = M S_start + X. So: (1) all segments compute
(X, M) from a zero start and from the identity, (2) one short serial pass per head turns them into every segment's start
(the kernel here), (3) all segments walk again from there. Twice the work and more, in a fraction of the steps.
For the gradient the same with M^T, from the last segment to the first. (Context parallelism joins ranks by the same algebra.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.architecture import architecture, facts
from kernels.common.segments import Segments
from kernels.delta_rule.triton_launch import launch, precision


def segment_tokens(x: Tensor, T: int, size: int, K: int, walks: int, blocks: int, **keys: int) -> int:
    """Tokens in a segment, or 0 where segments do not pay. size: tokens in a chunk.

    walks: sequences times heads, all told; blocks: programs a walk. T: length of a sequence if dense, of all together if
    packed. Segments do about three times the scan's work, hence only where the device would be mostly idle.
    """
    use = launch("delta_rule_segments", x, K=K, T=T, **keys)
    if use["CHUNKS"]:
        return use["CHUNKS"] * size if use["CHUNKS"] * size < T else 0
    units = facts(architecture(x.device)).units
    if K > 128 or walks * blocks * use["IDLE"] > units:
        return 0
    wanted = units * use["FILL"] // (walks * blocks)
    chunks = max(-(-T // (size * wanted)), use["LEAST"])
    return chunks * size if -(-T // (size * chunks)) > 2 else 0


@triton.jit
def _rows(pointer, value, channel, V: tl.constexpr, K: tl.constexpr):
    """Pointers and mask of S'[value, channel] in a state [K, V]."""
    mask = (value < V)[:, None] & (channel < K)[None, :]
    return pointer + channel[None, :] * V + value[:, None], mask


@triton.jit
def _square(pointer, i, j, K: tl.constexpr):
    return tl.load(pointer + i[:, None] * K + j[None, :], mask=(i < K)[:, None] & (j < K)[None, :], other=0.0)


@triton.jit
def join_kernel(
    outer,  # [N, HV, K, V] or None: the state at the start of each sequence (REVERSE: its gradient at the end)
    parts,  # [segments, HV, K, V] fp32: X
    transition,  # [segments, HV, K, K] fp32: M
    starts,  # [segments, HV, K, V] fp32 out: the state at the start of each segment (REVERSE: gradient at the end)
    final,  # [N, HV, K, V] fp32 out or None: the state at the end of each sequence (REVERSE: gradient at the start)
    first,  # [N + 1]
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KB: tl.constexpr,  # half the channels, or all if WIDE is False
    BV: tl.constexpr,
    WIDE: tl.constexpr,
    OUTER: tl.constexpr,
    FINAL: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    NV: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    value = (program % NV) * BV + tl.arange(0, BV)
    hv = (program // NV) % HV
    n = program // (NV * HV)
    low = tl.arange(0, KB)
    high = KB + tl.arange(0, KB)
    at_outer = (tl.cast(n, tl.int64) * HV + hv) * K * V

    a = tl.zeros([BV, KB], dtype=tl.float32)
    b = tl.zeros([BV, KB], dtype=tl.float32)
    if OUTER:
        pointer, mask = _rows(outer + at_outer, value, low, V, K)
        a += tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
        if WIDE:
            pointer, mask = _rows(outer + at_outer, value, high, V, K)
            b += tl.load(pointer, mask=mask, other=0.0).to(tl.float32)

    begin = tl.load(first + n)
    end = tl.load(first + n + 1)
    for step in range(end - begin):
        segment = (tl.cast(end - 1 - step if REVERSE else begin + step, tl.int64) * HV + hv) * K
        pointer, mask = _rows(starts + segment * V, value, low, V, K)
        tl.store(pointer, a, mask=mask)
        pointer, mask = _rows(parts + segment * V, value, low, V, K)
        new_a = tl.load(pointer, mask=mask, other=0.0)
        m = _square(transition + segment * K, low, low, K)
        new_a = tl.dot(a, m if REVERSE else tl.trans(m), acc=new_a, input_precision=PRECISION)
        if WIDE:
            pointer, mask = _rows(starts + segment * V, value, high, V, K)
            tl.store(pointer, b, mask=mask)
            pointer, mask = _rows(parts + segment * V, value, high, V, K)
            new_b = tl.load(pointer, mask=mask, other=0.0)
            # m_ij takes channel block j to i: forwards S'_i += S'_j m_ij^T, in reverse dS'_j += dS'_i m_ij.
            m = _square(transition + segment * K, low, high, K)
            if REVERSE:
                new_b = tl.dot(a, m, acc=new_b, input_precision=PRECISION)
            else:
                new_a = tl.dot(b, tl.trans(m), acc=new_a, input_precision=PRECISION)
            m = _square(transition + segment * K, high, low, K)
            if REVERSE:
                new_a = tl.dot(b, m, acc=new_a, input_precision=PRECISION)
            else:
                new_b = tl.dot(a, tl.trans(m), acc=new_b, input_precision=PRECISION)
            m = _square(transition + segment * K, high, high, K)
            new_b = tl.dot(b, m if REVERSE else tl.trans(m), acc=new_b, input_precision=PRECISION)
            b = new_b
        a = new_a

    if FINAL:
        pointer, mask = _rows(final + at_outer, value, low, V, K)
        tl.store(pointer, a, mask=mask)
        if WIDE:
            pointer, mask = _rows(final + at_outer, value, high, V, K)
            tl.store(pointer, b, mask=mask)


def join(
    segments: Segments, outer: Tensor | None, parts: Tensor, transition: Tensor, *, final: bool, reverse: bool
) -> tuple[Tensor, Tensor | None]:
    """(state at each segment's start [segments, HV, K, V], state at each sequence's end [N, HV, K, V] if final).

    reverse: (gradient at each segment's end, gradient at each sequence's start), from `outer` at the sequences' ends.
    """
    HV, K, V = parts.shape[1:]
    sequences = segments.first.numel() - 1
    starts = torch.empty_like(parts)
    end = parts.new_empty(sequences, HV, K, V) if final else None
    use = launch("delta_rule_join", parts, K=K, V=V)
    BV = min(use.pop("BV"), triton.next_power_of_2(max(V, 16)))
    KB = min(triton.next_power_of_2(max(K, 16)), 64)
    join_kernel[(triton.cdiv(V, BV) * HV * sequences,)](
        outer,
        parts,
        transition,
        starts,
        end,
        segments.first,
        HV=HV,
        K=K,
        V=V,
        KB=KB,
        BV=BV,
        WIDE=K > KB,
        OUTER=outer is not None,
        FINAL=final,
        REVERSE=reverse,
        PRECISION=precision(parts, "state"),
        **use,
    )
    return starts, end
