"""Launches of the scans over time, forwards and backwards: plain tensors in and out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.common.tiles import descriptor, dies
from kernels.delta_rule.triton_call import Prepared
from kernels.delta_rule.triton_launch import precision, v_tile
from kernels.delta_rule.triton_shape import Shape, spans
from kernels.delta_rule.triton_state import scan_backward_kernel, scan_forward_kernel


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
        DIES=dies(v.device),
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
        DIES=dies(do.device),
        PRECISION=precision(do, "state"),
        **use,
    )
    return Backward(d_states, d_error, d_initial)
