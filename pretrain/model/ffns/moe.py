"""Sparse mixture of SwiGLU experts: top-k token choice, dropless, with optional shared experts that every token uses.

The layer calls a dispatcher that it is given. The local one below computes all experts on this device; expert parallelism
replaces it from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kernels import experts
from pretrain.model.ffns.swiglu import SwiGLU
from pretrain.model.router import Gate, Router
from pretrain.model.sublayer import FFN, FFNConfig, linear_flops, require

# (x [N, D], gate_up [E, D, 2F], down [E, F, D], indices [N, k], scores [N, k]) -> y [N, D]
Dispatcher = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class MoEConfig(FFNConfig):
    kind: Literal["moe"] = "moe"
    experts: int = Field(ge=1)
    top_k: int = Field(ge=1)
    """Experts that each token uses."""
    hidden: int = Field(ge=1)
    """Hidden width of one expert."""
    shared_hidden: int = Field(0, ge=0)
    """Hidden width of the expert that every token uses besides its chosen ones; 0 for none."""
    gate: Gate = "sigmoid"
    """How router logits become scores; the chosen scores are normalised to sum to route_scale."""
    route_scale: float = Field(1.0, gt=0)
    bias_rate: float = Field(1e-3, ge=0)
    """How far the balancing bias moves after each step; 0 turns balancing off."""

    def build(self, width: int) -> MoE:
        return MoE(width, self)


class MoE(FFN):
    def __init__(self, width: int, config: MoEConfig):
        super().__init__()
        require(
            config.top_k <= config.experts,
            f"top_k={config.top_k} is more than experts={config.experts}; choose at most {config.experts}",
        )
        E, F = config.experts, config.hidden
        self.top_k = config.top_k
        self.router = Router(width, E, config.top_k, config.gate, config.route_scale, config.bias_rate)
        self.gate_up = nn.Parameter(torch.empty(E, width, 2 * F))
        self.down = nn.Parameter(torch.empty(E, F, width))
        self.shared = SwiGLU(width, config.shared_hidden) if config.shared_hidden else None
        self.dispatch: Dispatcher = experts

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        self.gate_up.normal_(0.0, std)
        self.down.normal_(0.0, std)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        indices, scores = self.router(tokens)
        if torch.is_autocast_enabled(x.device.type):
            tokens = tokens.to(torch.get_autocast_dtype(x.device.type))
        y = self.dispatch(tokens, self.gate_up, self.down, indices, scores).view_as(x)
        return y if self.shared is None else y + self.shared(x)

    def flops_per_token(self, context: float) -> float:
        routed = self.top_k / self.gate_up.shape[0] * linear_flops(self.gate_up, self.down)
        shared = 0.0 if self.shared is None else self.shared.flops_per_token(context)
        return linear_flops(self.router.weight) + routed + shared

    def active_parameters(self) -> int:
        experts_total = self.gate_up.numel() + self.down.numel()
        return super().active_parameters() - experts_total + experts_total // self.gate_up.shape[0] * self.top_k

    def output_projections(self) -> list[Tensor]:
        return [self.down] + ([] if self.shared is None else self.shared.output_projections())
