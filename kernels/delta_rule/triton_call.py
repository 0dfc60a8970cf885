"""Launches of the kernels that prepare the chunks: plain tensors in and out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.common.tiles import dies
from kernels.delta_rule.triton_channel import channel_gate_kernel, channel_tiles_kernel
from kernels.delta_rule.triton_launch import launch, precision
from kernels.delta_rule.triton_prepare import prepare_kernel
from kernels.delta_rule.triton_shape import Shape


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
    use = launch("delta_rule_prepare", q, **s.keys)
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
        BC=min(use.pop("BC"), s.BK),
        GATED=s.gate == 1,
        NORMALIZE=normalize,
        PACKED=s.chunks.packed,
        DIES=dies(q.device),
        PRECISION=precision(q, "inverse"),
        **use,
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
        DIES=dies(q.device),
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
        DIES=dies(q.device),
        PRECISION=precision(q, "inverse"),
        **use,
    )
    return p
