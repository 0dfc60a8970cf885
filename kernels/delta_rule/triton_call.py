"""The launches of the delta rule's kernels: one function a kernel, plain tensors in and out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from kernels.common.chunks import Chunks, dense_chunks, packed_chunks
from kernels.common.segments import Segments, segments_of
from kernels.common.tiles import descriptor, descriptors_pay
from kernels.delta_rule.triton_backward import gradients_kernel
from kernels.delta_rule.triton_channel import channel_gate_kernel, channel_tiles_kernel
from kernels.delta_rule.triton_channel_backward import channel_gradients_kernel, channel_squares_kernel
from kernels.delta_rule.triton_launch import chunk_size, launch, precision, v_tile
from kernels.delta_rule.triton_prepare import prepare_kernel
from kernels.delta_rule.triton_segments import segment_tokens
from kernels.delta_rule.triton_state import scan_backward_kernel, scan_forward_kernel


@dataclass(frozen=True)
class Shape:
    """What every launch of a call needs to know."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    gate: int  # 0 none, 1 one a head, 2 one a channel
    chunks: Chunks
    scale: float

    descriptors: bool  # tiles are read through tensor descriptors
    segments: Segments | None = None

    @property
    def BK(self) -> int:
        """K filled up to a tile."""
        return triton.next_power_of_2(max(self.K, 16))

    def tile(self, heads: int, *dims: int) -> tuple[int, ...]:
        return (self.chunks.count, heads, *dims)

    @property
    def keys(self) -> dict[str, int]:
        """What a tuning table may ask about."""
        return {"K": self.K, "V": self.V, "gate": self.gate, "T": self.T, "heads": self.chunks.sequences * self.HV}


def shape_of(q: Tensor, v: Tensor, g: Tensor | None, scale: float, cu_seqlens: Tensor | None) -> Shape:
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    gate = 0 if g is None else g.dim() - 2
    size = chunk_size(T, K, q, gate)
    chunks = dense_chunks(B, T, size) if cu_seqlens is None else packed_chunks(cu_seqlens, T, size)
    s = Shape(B, T, H, HV, K, V, gate, chunks, scale, descriptors_pay(q.device))
    _, block, _ = v_tile("delta_rule_scan_forward", q, descriptors=s.descriptors, **s.keys)
    tokens = segment_tokens(q, T, size, K, chunks.sequences * HV, triton.cdiv(V, block))
    if tokens:
        s = replace(s, segments=segments_of(chunks, cu_seqlens, tokens, q.device))
    return s


@dataclass(frozen=True)
class Prepared:
    """What the scans read, laid out by chunk slot: see the kernels' arguments."""

    q_in: Tensor
    k_in: Tensor
    k_out: Tensor
    rates: Tensor
    cumulative: Tensor | None
    ends: Tensor | None
    inverse: Tensor
    attention: Tensor
    q_unit: Tensor  # without a decay; the same as q_in unless the gate is one a channel
    k_unit: Tensor
    q_factor: Tensor | None
    k_factor: Tensor | None


def prepare(s: Shape, q: Tensor, k: Tensor, beta: Tensor, g: Tensor | None, normalize: bool) -> Prepared:
    """Everything inside the chunks that does not touch the state."""
    if s.gate == 2:
        assert g is not None
        return prepare_channel(s, q, k, beta, g, normalize)
    C = s.chunks.size
    inverse, attention = (q.new_empty(s.tile(s.HV, C, C)) for _ in range(2))
    rates = q.new_empty(s.tile(s.HV, C), dtype=torch.float32)
    cumulative = torch.empty_like(rates) if s.gate == 1 else None
    q_in, k_in = (q.new_empty(s.tile(s.H, C, s.BK)) for _ in range(2))
    q_factor, k_factor = _factors(s, q, normalize)
    prepare_kernel[(s.HV, s.chunks.count)](
        q,
        k,
        beta,
        g,
        q_in,
        k_in,
        q_factor,
        k_factor,
        rates,
        cumulative,
        inverse,
        attention,
        s.chunks.cu_seqlens,
        s.chunks.indices,
        s.scale,
        s.T,
        H=s.H,
        HV=s.HV,
        K=s.K,
        BT=C,
        BK=s.BK,
        GATED=s.gate == 1,
        NORMALIZE=normalize,
        PACKED=s.chunks.packed,
        PRECISION=precision(q, "inverse"),
        **launch("delta_rule_prepare", q, **s.keys),
    )
    return Prepared(q_in, k_in, k_in, rates, cumulative, None, inverse, attention, q_in, k_in, q_factor, k_factor)


def _factors(s: Shape, q: Tensor, normalize: bool) -> tuple[Tensor | None, Tensor | None]:
    if not normalize:
        return None, None
    factor = q.new_empty(2, *s.tile(s.H, s.chunks.size), dtype=torch.float32)
    return factor[0], factor[1]


def channel_gate(
    s: Shape, q: Tensor, k: Tensor, beta: Tensor, g: Tensor, normalize: bool, tiles: tuple[Tensor, Tensor]
) -> Prepared:
    """The decayed copies of q and k. tiles: (inverse, attention), taken over as they are, written or not."""
    C = s.chunks.size
    rates = q.new_empty(s.tile(s.HV, C), dtype=torch.float32)
    cumulative = q.new_empty(s.tile(s.HV, C, s.BK), dtype=torch.float32)
    ends = q.new_empty(s.tile(s.HV, s.BK), dtype=torch.float32)
    q_unit, k_unit = (q.new_empty(s.tile(s.H, C, s.BK)) for _ in range(2))
    q_in, k_in, k_out = (q.new_empty(s.tile(s.HV, C, s.BK)) for _ in range(3))
    q_factor, k_factor = _factors(s, q, normalize)
    channel_gate_kernel[(s.HV, s.chunks.count)](
        q,
        k,
        beta,
        g,
        q_unit,
        k_unit,
        q_factor,
        k_factor,
        rates,
        cumulative,
        q_in,
        k_in,
        k_out,
        ends,
        s.chunks.cu_seqlens,
        s.chunks.indices,
        s.scale,
        s.T,
        H=s.H,
        HV=s.HV,
        K=s.K,
        BT=C,
        BK=s.BK,
        NORMALIZE=normalize,
        PACKED=s.chunks.packed,
        **launch("delta_rule_channel_gate", q, **s.keys),
    )
    return Prepared(q_in, k_in, k_out, rates, cumulative, ends, *tiles, q_unit, k_unit, q_factor, k_factor)


def prepare_channel(s: Shape, q: Tensor, k: Tensor, beta: Tensor, g: Tensor, normalize: bool) -> Prepared:
    C = s.chunks.size
    inverse, attention = (q.new_empty(s.tile(s.HV, C, C)) for _ in range(2))
    p = channel_gate(s, q, k, beta, g, normalize, (inverse, attention))
    use = launch("delta_rule_channel_tiles", q, **s.keys)
    channel_tiles_kernel[(s.HV, s.chunks.count)](
        p.q_unit,
        p.k_unit,
        p.rates,
        p.cumulative,
        inverse,
        attention,
        s.chunks.cu_seqlens,
        s.chunks.indices,
        s.scale,
        s.T,
        H=s.H,
        HV=s.HV,
        BT=C,
        BK=s.BK,
        BC=min(use.pop("BC"), s.BK),
        LEVELS=C.bit_length() - 1,
        PACKED=s.chunks.packed,
        PRECISION=precision(q, "inverse"),
        **use,
    )
    return p


@dataclass(frozen=True)
class Spans:
    """What a scan walks: sequences, or segments of them."""

    count: int
    begins: Tensor | None
    slots: Tensor | None


def spans(s: Shape) -> Spans:
    if s.segments is not None:
        return Spans(s.segments.count, s.segments.begins, s.segments.slots)
    return Spans(s.chunks.sequences, s.chunks.cu_seqlens, s.chunks.offsets)


@dataclass(frozen=True)
class Forward:
    """Results of a forward scan, those asked for."""

    o: Tensor | None
    final: Tensor | None
    states: Tensor | None
    v_new: Tensor | None
    transition: Tensor | None


def scan_forward(
    s: Shape,
    p: Prepared,
    v: Tensor,
    initial: Tensor | None,
    *,
    output: bool = False,
    keep: bool = False,
    final: bool = False,
    summary: bool = False,
) -> Forward:
    """Walks every span. initial, and the result's final and transition: one per span.

    output: o; keep: the chunks' states and V_new; final: the state at the end; summary: that and the transition.
    """
    to = spans(s)
    C = s.chunks.size
    o = torch.empty_like(v) if output else None
    states = v.new_empty(s.tile(s.HV, s.V, s.BK)) if keep else None
    v_new = v.new_empty(s.tile(s.HV, s.V, C)) if keep else None
    end = v.new_empty(to.count, s.HV, s.K, s.V, dtype=torch.float32) if final or summary else None
    transition = v.new_empty(to.count, s.HV, s.K, s.K, dtype=torch.float32) if summary else None
    use, BV, through = v_tile("delta_rule_scan_forward", v, descriptors=s.descriptors, **s.keys)
    whole = through and output and not s.chunks.packed and s.T % C == 0
    blocks = triton.cdiv(s.V, BV) + (triton.cdiv(s.K, BV) if summary else 0)
    scan_forward_kernel[(blocks * s.HV * to.count,)](
        descriptor(p.q_in, s.BK, (C, s.BK), through),
        descriptor(p.k_in, s.BK, (C, s.BK), through),
        descriptor(p.k_out, s.BK, (C, s.BK), through),
        descriptor(v, s.HV * s.V, (C, BV), through),
        p.rates,
        p.cumulative,
        p.ends,
        descriptor(p.inverse, C, (C, C), through),
        descriptor(p.attention, C, (C, C), through),
        descriptor(o, s.HV * s.V, (C, BV), whole),
        descriptor(states, s.BK, (BV, s.BK), through),
        descriptor(v_new, C, (BV, C), through),
        initial,
        end,
        transition,
        to.begins,
        to.slots,
        s.scale,
        s.T,
        H=s.H,
        HV=s.HV,
        K=s.K,
        V=s.V,
        BT=C,
        BK=s.BK,
        BV=BV,
        GATE=s.gate,
        OUTPUT=output,
        KEEP=keep,
        INITIAL=initial is not None,
        FINAL=final,
        SUMMARY=summary,
        WHOLE=whole,
        PACKED=to.begins is not None,
        DESCRIPTOR=through,
        PRECISION=precision(v, "state"),
        **use,
    )
    return Forward(o, end, states, v_new, transition)


@dataclass(frozen=True)
class Backward:
    """Results of a backward scan, those asked for."""

    d_states: Tensor | None
    d_error: Tensor | None
    d_initial: Tensor | None


def scan_backward(
    s: Shape, p: Prepared, do: Tensor, d_final: Tensor | None, *, keep: bool = False, initial: bool = False
) -> Backward:
    """Walks every span from its end. d_final, and the result's d_initial: one per span.

    keep: gradients of the chunks' end states and of the triangular systems' right-hand sides.
    """
    to = spans(s)
    C = s.chunks.size
    d_states = do.new_empty(s.tile(s.HV, s.V, s.BK)) if keep else None
    d_error = do.new_empty(s.tile(s.HV, s.V, C)) if keep else None
    d_initial = do.new_empty(to.count, s.HV, s.K, s.V, dtype=torch.float32) if initial else None
    use, BV, through = v_tile("delta_rule_scan_backward", do, descriptors=s.descriptors, **s.keys)
    scan_backward_kernel[(triton.cdiv(s.V, BV) * s.HV * to.count,)](
        descriptor(p.q_in, s.BK, (C, s.BK), through),
        descriptor(p.k_in, s.BK, (C, s.BK), through),
        descriptor(p.k_out, s.BK, (C, s.BK), through),
        descriptor(do, s.HV * s.V, (C, BV), through),
        p.rates,
        p.cumulative,
        p.ends,
        descriptor(p.inverse, C, (C, C), through),
        descriptor(p.attention, C, (C, C), through),
        descriptor(d_states, s.BK, (BV, s.BK), through),
        descriptor(d_error, C, (BV, C), through),
        d_final,
        d_initial,
        to.begins,
        to.slots,
        s.scale,
        s.T,
        H=s.H,
        HV=s.HV,
        K=s.K,
        V=s.V,
        BT=C,
        BK=s.BK,
        BV=BV,
        GATE=s.gate,
        KEEP=keep,
        INITIAL=initial,
        FINAL=d_final is not None,
        PACKED=to.begins is not None,
        DESCRIPTOR=through,
        PRECISION=precision(do, "state"),
        **use,
    )
    return Backward(d_states, d_error, d_initial)


@dataclass(frozen=True)
class Walked:
    """What the two scans leave for the gradients inside the chunks."""

    states: Tensor
    v_new: Tensor
    d_states: Tensor
    d_error: Tensor


def gradients(
    s: Shape, p: Prepared, w: Walked, v: Tensor, do: Tensor, dtypes: tuple[torch.dtype, torch.dtype | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dbeta, dg) without a gate or with one gate a head. dtypes: of dbeta and dg."""
    C = s.chunks.size
    # Gradients of shared key heads are summed over their value heads afterwards, hence fp32 until then.
    kind = torch.float32 if s.HV > s.H else v.dtype
    dq, dk = (v.new_empty(s.B, s.T, s.HV, s.K, dtype=kind) for _ in range(2))
    dv = torch.empty_like(v)
    dbeta = v.new_empty(s.B, s.T, s.HV, dtype=dtypes[0])
    dg = v.new_empty(s.B, s.T, s.HV, dtype=dtypes[1]) if s.gate == 1 else None
    use, BV, through = v_tile("delta_rule_gradients", v, descriptors=s.descriptors, **s.keys)
    gradients_kernel[(s.HV, s.chunks.count)](
        descriptor(p.q_unit, s.BK, (C, s.BK), through),
        descriptor(p.k_unit, s.BK, (C, s.BK), through),
        descriptor(v, s.HV * s.V, (C, BV), through),
        descriptor(do, s.HV * s.V, (C, BV), through),
        p.rates,
        p.cumulative,
        descriptor(w.states, s.BK, (BV, s.BK), through),
        descriptor(w.d_states, s.BK, (BV, s.BK), through),
        descriptor(w.v_new, C, (BV, C), through),
        descriptor(w.d_error, C, (BV, C), through),
        p.q_factor,
        p.k_factor,
        dq,
        dk,
        dv,
        dbeta,
        dg,
        s.chunks.cu_seqlens,
        s.chunks.indices,
        s.scale,
        s.T,
        H=s.H,
        HV=s.HV,
        K=s.K,
        V=s.V,
        BT=C,
        BK=s.BK,
        BV=BV,
        GATED=s.gate == 1,
        NORMALIZE=p.q_factor is not None,
        PACKED=s.chunks.packed,
        DESCRIPTOR=through,
        PRECISION=precision(v, "fast"),
        **use,
    )
    return _over_groups(s, dq, v.dtype), _over_groups(s, dk, v.dtype), dv, dbeta, dg


def channel_gradients(
    s: Shape, p: Prepared, w: Walked, v: Tensor, do: Tensor, dtypes: tuple[torch.dtype, torch.dtype | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dbeta, dg) with a gate a channel; dq and dk belong to the q and k of unit length."""
    C = s.chunks.size
    d_scores, d_lower = (v.new_empty(s.tile(s.HV, C, C)) for _ in range(2))
    dv = torch.empty_like(v)
    use, BV_gradients, through_gradients = v_tile(
        "delta_rule_channel_gradients", v, descriptors=s.descriptors, **s.keys
    )
    BC = min(use.pop("BC"), s.BK)
    dbeta = v.new_empty(1 + s.BK // BC, s.B, s.T, s.HV, dtype=torch.float32)
    use_squares, BV, through = v_tile("delta_rule_channel_squares", v, descriptors=s.descriptors, **s.keys)
    channel_squares_kernel[(s.HV, s.chunks.count)](
        descriptor(v, s.HV * s.V, (C, BV), through),
        descriptor(do, s.HV * s.V, (C, BV), through),
        p.rates,
        descriptor(w.v_new, C, (BV, C), through),
        descriptor(w.d_error, C, (BV, C), through),
        d_scores,
        d_lower,
        dv,
        dbeta[0],
        s.chunks.cu_seqlens,
        s.chunks.indices,
        s.scale,
        s.T,
        HV=s.HV,
        V=s.V,
        BT=C,
        BV=BV,
        PACKED=s.chunks.packed,
        DESCRIPTOR=through,
        PRECISION=precision(v, "fast"),
        **use_squares,
    )
    dq, dk = (v.new_empty(s.B, s.T, s.HV, s.K, dtype=torch.float32) for _ in range(2))
    dg = v.new_empty(s.B, s.T, s.HV, s.K, dtype=dtypes[1])
    BV, through = BV_gradients, through_gradients
    channel_gradients_kernel[(s.HV * (s.BK // BC), s.chunks.count)](
        p.q_unit,
        p.k_unit,
        descriptor(do, s.HV * s.V, (C, BV), through),
        p.rates,
        p.cumulative,
        descriptor(w.states, s.BK, (BV, BC), through),
        descriptor(w.d_states, s.BK, (BV, BC), through),
        descriptor(w.v_new, C, (BV, C), through),
        descriptor(w.d_error, C, (BV, C), through),
        d_scores,
        d_lower,
        dq,
        dk,
        dbeta[1:],
        dg,
        s.chunks.cu_seqlens,
        s.chunks.indices,
        s.scale,
        s.T,
        s.B * s.T,
        H=s.H,
        HV=s.HV,
        K=s.K,
        V=s.V,
        BT=C,
        BK=s.BK,
        BC=BC,
        BV=BV,
        LEVELS=C.bit_length() - 1,
        PACKED=s.chunks.packed,
        DESCRIPTOR=through,
        PRECISION=precision(v, "fast"),
        **use,
    )
    return _over_groups(s, dq, torch.float32), _over_groups(s, dk, torch.float32), dv, dbeta.sum(0).to(dtypes[0]), dg


def _over_groups(s: Shape, x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, HV, K] summed over the value heads that share a key head."""
    return x if s.HV == s.H else x.view(s.B, s.T, s.H, s.HV // s.H, s.K).sum(3).to(dtype)
