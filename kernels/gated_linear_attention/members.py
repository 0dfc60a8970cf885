"""The members of the family: what each published model puts into q, k, v and g.

Every gate here is a natural log decay <= 0, computed and returned in fp32 (fp64 for fp64 inputs) whatever the model's dtype:
a decay near 1 acts hundreds of times, and bf16 cannot tell 0.998 from 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def retention_gate(heads: int, device: torch.device | str | None = None) -> Tensor:
    """Log decay of each head of RetNet, log(1 - 2^(-5 - h)), h = 0 .. heads-1: fp32 [heads].

    The same at every step: expand it to [B, T, heads]. q and k carry rotary positions. Source: arXiv:2307.08621, section 3.1.
    """
    exponent = -5.0 - torch.arange(heads, dtype=torch.float32, device=device)
    return torch.log1p(-torch.exp2(exponent))


def gla_gate(z: Tensor, normalizer: float = 16.0) -> Tensor:
    """Log decay of GLA, logsigmoid(z) / normalizer: z [B, T, H, K] of the low-rank projection -> the same shape.

    Source: arXiv:2312.06635, section 4.4 (there α = σ(z)^(1/τ), τ = 16).
    """
    return F.logsigmoid(_wide(z)) / normalizer


class GateAndKey(NamedTuple):
    g: Tensor
    k: Tensor


def hgrn2_gate_and_key(f: Tensor, lower_bound: float | Tensor = 0.0) -> GateAndKey:
    """HGRN2 ties the key to the gate: α = lb + (1 - lb) σ(f), g = log α, k = 1 - α.

    f [B, T, H, K]; lower_bound: the layer's floor of α in [0, 1), a number or a tensor that broadcasts.
    Returns g in fp32 at least and k in f's dtype.
    Source: arXiv:2404.07904, section 3.1; the bound rises with depth, arXiv:2311.04823, section 3.2.
    """
    if not isinstance(lower_bound, Tensor):
        if not 0.0 <= lower_bound < 1.0:
            raise ValueError(f"lower_bound must be in [0, 1), got {lower_bound}")
        lower_bound = torch.tensor(lower_bound, device=f.device)
    bound = _wide(lower_bound)
    # log(lb + (1 - lb) σ(f)) without forming α, which would round small decays away; a bound of 0 has no logarithm.
    floor = bound.clamp(min=torch.finfo(bound.dtype).tiny).log()
    g = torch.logaddexp(floor, torch.log1p(-bound) + F.logsigmoid(_wide(f)))
    return GateAndKey(g, -torch.expm1(g).to(f.dtype))


class StateSpaceDual(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    scale: float


def mamba2_step_size(dt: Tensor, dt_bias: Tensor, limits: tuple[float, float] = (0.0, math.inf)) -> Tensor:
    """Mamba-2's step sizes, softplus(dt + dt_bias) within limits: dt [B, T, H], dt_bias [H] -> fp32 [B, T, H]."""
    return F.softplus(_wide(dt) + _wide(dt_bias)).clamp(*limits)


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> StateSpaceDual:
    """Mamba-2 as gated linear attention: q = C, k = B, v = dt x, g = dt A, scale 1.

    x [b, T, H, P]; dt [b, T, H] after `mamba2_step_size`; A [H], < 0; B, C [b, T, G, N], H a multiple of the groups G.
    Call `gated_linear_attention(*d[:4], scale=d.scale)` and add D x. The state is [b, H, N, P], the transpose of Mamba's.
    Source: arXiv:2405.21060, sections 3 and 7.
    """
    step = _wide(dt)
    return StateSpaceDual(C, B, (_wide(x) * step[..., None]).to(x.dtype), step * _wide(A), 1.0)


def gdn_gate(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Log decay of Gated DeltaNet, -exp(A_log) softplus(a + dt_bias): a [B, T, H]; A_log, dt_bias [H] -> fp32 [B, T, H].

    Source: arXiv:2412.06464, section 3.4, with Mamba-2's parameters.
    """
    return -_wide(A_log).exp() * F.softplus(_wide(a) + _wide(dt_bias))


def kda_gate(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """The same a channel, for Kimi Delta Attention: a [B, T, H, K]; A_log [H]; dt_bias [H * K] or [H, K].

    Source: arXiv:2510.26692, section 4.
    """
    bias = _wide(dt_bias).view(a.shape[-2:])
    return -_wide(A_log).exp()[:, None] * F.softplus(_wide(a) + bias)


def kda_safe_gate(a: Tensor, A_log: Tensor, dt_bias: Tensor, lower_bound: float = -5.0) -> Tensor:
    """KDA's bounded gate, lower_bound σ(exp(A_log) (a + dt_bias)), in (lower_bound, 0). Shapes as for `kda_gate`.

    Source: the `safe_gate` option of KDA in flash-linear-attention.
    """
    if lower_bound >= 0:
        raise ValueError(f"lower_bound must be negative (a log decay), got {lower_bound}")
    bias = _wide(dt_bias).view(a.shape[-2:])
    return lower_bound * torch.sigmoid(_wide(A_log).exp()[:, None] * (_wide(a) + bias))
