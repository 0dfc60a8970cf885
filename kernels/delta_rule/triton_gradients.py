"""Launches of the kernels for the gradients inside the chunks: plain tensors in and out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.common.tiles import descriptor
from kernels.delta_rule.triton_backward import gradients_kernel
from kernels.delta_rule.triton_call import Prepared
from kernels.delta_rule.triton_channel_backward import channel_gradients_kernel, channel_squares_kernel
from kernels.delta_rule.triton_launch import precision, v_tile
from kernels.delta_rule.triton_shape import Shape


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
