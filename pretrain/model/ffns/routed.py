"""What all sparse FFNs share: E SwiGLU experts as two stacked weights, and the dispatcher that brings tokens to them.

The layer calls a dispatcher that it is given. The local one computes all experts on this device; expert parallelism replaces
it from outside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels import experts
from pretrain.model.sublayer import ContextualFFN, linear_flops, require

# (x [N, D], gate_up [E, D, 2F], down [E, F, D], indices [N, k], scores [N, k]) -> y [N, D]
Dispatcher = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class RoutedFFN(ContextualFFN):
    """gate_up [E, D, 2F]: gate columns first, then up; down [E, F, D]. No token is dropped."""

    def __init__(self, width: int, experts_count: int, top_k: int, hidden: int):
        super().__init__()
        require(
            top_k <= experts_count,
            f"top_k={top_k} is more than experts={experts_count}; choose at most {experts_count}",
        )
        self.top_k = top_k
        self.gate_up = nn.Parameter(torch.empty(experts_count, width, 2 * hidden))
        self.down = nn.Parameter(torch.empty(experts_count, hidden, width))
        self.dispatch: Dispatcher = experts

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        self.gate_up.normal_(0.0, std)
        self.down.normal_(0.0, std)

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
