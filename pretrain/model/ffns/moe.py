"""Sparse mixture of SwiGLU experts: top-k token choice, dropless, with optional shared experts that every token uses.

Expresses the layers of Qwen3-MoE (softmax, normalize, no bias), Qwen3-Next (the same with a gated shared expert), and DeepSeek-V3
and Kimi Linear (sigmoid, normalize, bias, route_scale, groups, shared expert).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from kernels.experts import load
from pretrain.model.ffns.routed import Dispatcher, RoutedFFN
from pretrain.model.ffns.swiglu import SwiGLU
from pretrain.model.router import Gate, Router, Routing, unreduced
from pretrain.model.router_losses import batch_loss, sequence_loss, z_loss
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import Carry, FFNConfig, linear_flops, require

__all__ = ["Dispatcher", "MoE", "MoEConfig"]


class MoEConfig(FFNConfig):
    kind: Literal["moe"] = "moe"
    experts: int = Field(ge=1)
    top_k: int = Field(ge=1)
    """Experts that each token uses."""
    hidden: int = Field(ge=1)
    """Hidden width of one expert."""
    shared_hidden: int = Field(0, ge=0)
    """Hidden width of the expert that every token uses besides its chosen ones; 0 for none. Several shared experts of one
    width are one shared expert of their total width."""
    shared_gate: bool = False
    """Each token weighs the shared expert by a sigmoid of its own (Qwen3-Next)."""
    gate: Gate = "sigmoid"
    """How router logits become scores."""
    normalize: bool = True
    """The scores of the chosen experts are normalised to sum to route_scale (norm_topk_prob)."""
    route_scale: float = Field(1.0, gt=0)
    """Factor on the scores of the chosen."""
    groups: int = Field(1, ge=1)
    """Experts lie in this many groups of neighbours, of which a token may use a few: fewer nodes to reach (DeepSeek-V3)."""
    top_groups: int = Field(1, ge=1)
    """Groups that a token may use, the best by the sum of each group's two best experts."""
    bias_rate: float = Field(1e-3, ge=0)
    """How far the balancing bias moves after each step; 0 turns balancing off."""
    batch_loss: float = Field(0.0, ge=0)
    """Weight of the balancing loss over the batch (Switch)."""
    sequence_loss: float = Field(0.0, ge=0)
    """Weight of the balancing loss within each sequence (DeepSeek-V3 takes 1e-4)."""
    z_loss: float = Field(0.0, ge=0)
    """Weight of the squared log-partition of the router's logits (ST-MoE takes 1e-3)."""

    def build(self, width: int) -> MoE:
        return MoE(width, self)


class MoE(RoutedFFN):
    def __init__(self, width: int, config: MoEConfig):
        super().__init__(width, config.experts, config.top_k, config.hidden)
        _check(config)
        self.config = config
        self.router = Router(
            width,
            config.experts,
            config.top_k,
            config.gate,
            config.route_scale,
            config.bias_rate,
            normalize=config.normalize,
            groups=config.groups,
            top_groups=config.top_groups,
        )
        self.shared = SwiGLU(width, config.shared_hidden) if config.shared_hidden else None
        self.shared_gate = nn.Linear(width, 1, bias=False) if config.shared_gate else None
        self.reduce_load: Callable[[Tensor], Tensor] = unreduced
        """int64 [E] -> its sum over the ranks that share a global batch, for batch_loss; called once a forward pass."""

    def forward(
        self, x: Tensor, sequence: SequenceContext, cache: dict[str, Any] | None, carry: Carry
    ) -> tuple[Tensor, Carry]:
        routing = self.router.route(x.flatten(0, -2))
        pending = self.start(self._tokens(x), routing.indices, routing.scores)
        shared = None if self.shared is None else self._shared(self.shared, x)  # while tokens are on their way
        y = pending.finish().view_as(x)
        if shared is not None:
            y = y + shared
        return y, self._with_losses(carry, routing, sequence) if self.training else carry

    def _shared(self, shared: SwiGLU, x: Tensor) -> Tensor:
        y = shared(x)
        if self.shared_gate is None:
            return y
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            return functional.linear(x.to(wide), self.shared_gate.weight.to(wide)).sigmoid().to(y.dtype) * y

    def _with_losses(self, carry: Carry, routing: Routing, sequence: SequenceContext) -> Carry:
        config = self.config
        if config.batch_loss:
            counts = self.reduce_load(load(routing.indices, config.experts))
            carry = carry.add(config.batch_loss * batch_loss(routing.affinity, counts))
        if config.sequence_loss:
            loss = sequence_loss(routing.affinity, config.top_k, *sequence.owners(), sequence.total)
            carry = carry.add(config.sequence_loss * loss)
        if config.z_loss:
            carry = carry.add(config.z_loss * z_loss(routing.logits))
        return carry

    def flops_per_token(self, context: float) -> float:
        shared = 0.0 if self.shared is None else self.shared.flops_per_token(context)
        gate = 0.0 if self.shared_gate is None else linear_flops(self.shared_gate.weight)
        return linear_flops(self.router.weight) + self._routed_flops() + shared + gate

    def output_projections(self) -> list[Tensor]:
        return [self.down] + ([] if self.shared is None else self.shared.output_projections())


def _check(config: MoEConfig) -> None:
    E, groups, open_groups = config.experts, config.groups, config.top_groups
    require(
        not config.shared_gate or config.shared_hidden > 0,
        "shared_gate=true needs a shared expert; set shared_hidden, or shared_gate=false",
    )
    require(
        E % groups == 0 and (groups == 1 or E // groups >= 2),
        f"groups={groups} does not cut experts={E} into equal groups of two or more; choose a divisor of {E}",
    )
    require(open_groups <= groups, f"top_groups={open_groups} is more than groups={groups}; choose at most {groups}")
    require(
        config.top_k <= E // groups * open_groups,
        f"top_k={config.top_k} is more than the {E // groups * open_groups} experts of top_groups={open_groups} groups; "
        "choose more top_groups or a smaller top_k",
    )
