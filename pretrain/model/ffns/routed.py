"""What all sparse FFNs share: E SwiGLU experts as two stacked weights, and the dispatcher that brings tokens to them.

The layer calls a dispatcher that it is given. The local one computes all experts on this device; expert parallelism replaces
it from outside, and the weights by a share of them. A dispatcher that takes its time has `start`, which is called like the
dispatcher and returns at once: what is computed before `.finish()` overlaps with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from kernels import experts
from kernels.common.opaque import opaque
from pretrain.model.split import Section, Split
from pretrain.model.sublayer import ContextualFFN, linear_flops, require

# (x [N, D], gate_up [E, D, 2F], down [E, F, D], indices [N, k], scores [N, k]) -> y [N, D]
Dispatcher = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
local: Dispatcher = opaque(experts)


class Pending(Protocol):
    """A dispatch that has been started."""

    def finish(self) -> Tensor:
        """Its result y [N, D]. Call it once."""


@dataclass
class Later:
    """For a dispatcher without start: everything happens at the end."""

    finish: Callable[[], Tensor]


class RoutedFFN(ContextualFFN):
    """gate_up [E, D, 2F]: gate columns first, then up; down [E, F, D]. No token is dropped."""

    routes_by_token = True  # each token by itself, so that ranks may hold any slices of a sequence

    def __init__(self, width: int, experts_count: int, top_k: int, hidden: int):
        super().__init__()
        require(
            top_k <= experts_count,
            f"top_k={top_k} is more than experts={experts_count}; choose at most {experts_count}",
        )
        self.experts, self.top_k = experts_count, top_k
        self.gate_up = nn.Parameter(torch.empty(experts_count, width, 2 * hidden))
        self.down = nn.Parameter(torch.empty(experts_count, hidden, width))
        self.dispatch: Dispatcher = local

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        self.gate_up.normal_(0.0, std)
        self.down.normal_(0.0, std)

    def start(self, tokens: Tensor, indices: Tensor, scores: Tensor) -> Pending:
        """tokens [N, D] through their experts, as far as that can go on by itself."""
        arguments = (tokens, self.gate_up, self.down, indices, scores)
        start: Callable[..., Pending] | None = getattr(self.dispatch, "start", None)
        return Later(partial(self.dispatch, *arguments)) if start is None else start(*arguments)

    def expert_splits(self) -> dict[str, tuple[Split, ...]]:
        """How the experts can be shared out: over ep whole ones, over tp the hidden width of each."""
        return expert_splits("gate_up", "down", self.experts, self.down.shape[1])

    def _tokens(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [N, D] in the dtype of the experts' products."""
        tokens = x.flatten(0, -2)
        if torch.is_autocast_enabled(x.device.type):
            return tokens.to(torch.get_autocast_dtype(x.device.type))
        return tokens

    def _routed_flops(self) -> float:
        return self.top_k / self.gate_up.shape[0] * linear_flops(self.gate_up, self.down)

    def active_parameters(self) -> int:
        total = self.gate_up.numel() + self.down.numel()
        return super().active_parameters() - total + total // self.gate_up.shape[0] * self.top_k

    def output_projections(self) -> list[Tensor]:
        return [self.down]


def expert_splits(gate_up: str, down: str, experts: int, hidden: int) -> dict[str, tuple[Split, ...]]:
    """For gate_up [experts, D, 2 * hidden], gate columns first, and down [experts, hidden, D], by the names of the parameters."""
    whole = Split(0, (Section.even(experts, "experts"),), "ep")
    part = Section.even(hidden, "hidden")
    return {gate_up: (whole, Split(2, (part, part))), down: (whole, Split(1, (part,)))}
