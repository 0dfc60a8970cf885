"""Launches of the kernels for the gradients inside the chunks: plain tensors in and out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.common.tiles import descriptor, dies
from kernels.delta_rule.triton_backward import gradients_kernel
from kernels.delta_rule.triton_call import Prepared
from kernels.delta_rule.triton_channel_backward import channel_gradients_kernel
from kernels.delta_rule.triton_launch import precision, v_tile
from kernels.delta_rule.triton_shape import Shape
from kernels.delta_rule.triton_squares import squares_kernel


@dataclass(frozen=True)
class Walked:
    """What the two scans leave for the gradients inside the chunks."""

    states: Tensor
    v_new: Tensor
    d_states: Tensor
    d_error: Tensor


@dataclass(frozen=True)
class Squares:
    """Tiles [slots, HV, C, C] that all gradients inside a chunk need, and those gradients that need no more."""

    d_scores: Tensor
    d_lower: Tensor
    dv: Tensor


def squares(s: Shape, p: Prepared, w: Walked, v: Tensor, do: Tensor, dbeta: Tensor) -> Squares:
    """dbeta: fp32 [B, T, HV], takes the part of beta's gradient that comes through v."""
    C = s.chunks.size
    d_scores, d_lower = (v.new_empty(s.tile(s.HV, C, C)) for _ in range(2))
    dv = torch.empty_like(v)
    use, BV, through = v_tile("delta_rule_squares", v, descriptors=s.descriptors, **s.keys)
    squares_kernel[(s.HV, s.chunks.count)](
        descriptor(v, s.HV * s.V, (C, BV), through),
        descriptor(do, s.HV * s.V, (C, BV), through),
        p.rates,
        p.cumulative,
        descriptor(w.v_new, C, (BV, C), through),
        descriptor(w.d_error, C, (BV, C), through),
        d_scores,
        d_lower,
        dv,
        dbeta,
        s.chunks.cu_seqlens,
        s.chunks.indices,
        s.scale,
        s.T,
        HV=s.HV,
        V=s.V,
        BT=C,
        BV=BV,
        GATE=s.gate,
        PACKED=s.chunks.packed,
        DESCRIPTOR=through,
        PRECISION=precision(v, "fast"),
        **use,
    )
    return Squares(d_scores, d_lower, dv)


def gradients(
    s: Shape, p: Prepared, w: Walked, v: Tensor, do: Tensor, dtypes: tuple[torch.dtype, torch.dtype | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dbeta, dg) without a gate or with one gate a head. dtypes: of dbeta and dg."""
    C = s.chunks.size
    # Gradients of shared key heads are summed over their value heads afterwards, hence fp32 until then.
    kind = torch.float32 if s.HV > s.H else v.dtype
    dq, dk = (v.new_empty(s.B, s.T, s.HV, s.K, dtype=kind) for _ in range(2))
    dbeta_v = v.new_empty(s.B, s.T, s.HV, dtype=torch.float32)
    dbeta = torch.empty_like(dbeta_v, dtype=dtypes[0])
    dg = v.new_empty(s.B, s.T, s.HV, dtype=dtypes[1]) if s.gate == 1 else None
    square = squares(s, p, w, v, do, dbeta_v)
    use, BV, through = v_tile("delta_rule_gradients", v, descriptors=s.descriptors, **s.keys)
    BR = min(use.pop("BR"), C)
    gradients_kernel[(s.HV, s.chunks.count)](
        p.q_unit,
        p.k_unit,
        descriptor(do, s.HV * s.V, (C, BV), through),
        p.rates,
        p.cumulative,
        descriptor(w.states, s.BK, (BV, s.BK), through),
        descriptor(w.d_states, s.BK, (BV, s.BK), through),
        descriptor(w.v_new, C, (BV, C), through),
        descriptor(w.d_error, C, (BV, C), through),
        square.d_scores,
        square.d_lower,
        dbeta_v,
        p.q_factor,
        p.k_factor,
        dq,
        dk,
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
        BR=BR,
        GATED=s.gate == 1,
        NORMALIZE=p.q_factor is not None,
        PACKED=s.chunks.packed,
        DESCRIPTOR=through,
        DIES=dies(v.device),
        PRECISION=precision(v, "fast"),
        **use,
    )
    return _over_groups(s, dq, v.dtype), _over_groups(s, dk, v.dtype), square.dv, dbeta, dg


def channel_gradients(
    s: Shape, p: Prepared, w: Walked, v: Tensor, do: Tensor, dtypes: tuple[torch.dtype, torch.dtype | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dbeta, dg) with a gate a channel; dq and dk belong to the q and k of unit length."""
    C = s.chunks.size
    use, BV, through = v_tile("delta_rule_channel_gradients", v, descriptors=s.descriptors, **s.keys)
    BC = min(use.pop("BC"), s.BK)
    dbeta = v.new_empty(1 + s.BK // BC, s.B, s.T, s.HV, dtype=torch.float32)
    square = squares(s, p, w, v, do, dbeta[0])
    dq, dk = (v.new_empty(s.B, s.T, s.HV, s.K, dtype=torch.float32) for _ in range(2))
    dg = v.new_empty(s.B, s.T, s.HV, s.K, dtype=dtypes[1])
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
        square.d_scores,
        square.d_lower,
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
        DIES=dies(v.device),
        PRECISION=precision(v, "fast"),
        **use,
    )
    return (
        _over_groups(s, dq, torch.float32),
        _over_groups(s, dk, torch.float32),
        square.dv,
        dbeta.sum(0).to(dtypes[0]),
        dg,
    )


def _over_groups(s: Shape, x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, HV, K] summed over the value heads that share a key head."""
    return x if s.HV == s.H else x.view(s.B, s.T, s.H, s.HV // s.H, s.K).sum(3).to(dtype)
