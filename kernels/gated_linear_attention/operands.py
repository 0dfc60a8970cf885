"""A call's tensors by token and head, with the list of chunks that they are worked on in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.common.exponential import exp_
from kernels.gated_linear_attention.plan import Plan, Segment


@dataclass(frozen=True)
class Operands:
    """q, k [tokens, H / repeat, K]; v [tokens, H R, V]; g [tokens, H R] or [tokens, H R, K] or None.

    H heads carry a state of R * V columns each. R value heads share a query-key head where the decay is one number a head (it
    then goes with the values); with a decay a channel every value head needs its own scaled q and k, so that R = 1 there
    and q and k are repeated.
    """

    plan: Plan
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    H: int
    R: int
    repeat: int
    scale: float
    compute: torch.dtype  # of matmul operands
    wide: torch.dtype  # of gates and states
    size: int  # chunks a segment

    @property
    def K(self) -> int:
        return self.q.shape[2]

    @property
    def V(self) -> int:
        return self.v.shape[2]

    def fetch_qk(self, segment: Segment) -> tuple[Tensor, Tensor]:
        """[m H, C, K] each."""
        q, k = (segment.fetch(x, dtype=self.compute) for x in (self.q, self.k))
        if self.repeat > 1:
            q, k = q.repeat_interleave(self.repeat, 0), k.repeat_interleave(self.repeat, 0)
        return q, k


def decay_factor(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """exp in place, zero below what factors in `dtype` should hold: 1e-26, or 1e-130 for fp64.

    A fading product of such factors passes through denormal numbers, on which matrix products run ten times slower. What is
    cut is lost in rounding anyway: a token's own contribution carries the factor 1.
    """
    least = -300.0 if dtype == torch.float64 else -60.0
    return exp_(torch.threshold_(exponent, least, -torch.inf))
