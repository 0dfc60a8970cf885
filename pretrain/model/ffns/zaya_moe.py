"""ZAYA1's sparse FFN: SwiGLU experts behind its router (see pretrain.model.zaya_router), and an optional choice to skip.

A token that chooses to skip goes through no expert in that place. In the released code its output there is p * x, x the
normalised input (skip: identity); in the converted weights' code it is 0 (skip: zero); the papers do not mention it (off).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from kernels.common.opaque import opaque
from pretrain.model.ffns.routed import RoutedFFN
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import Carry, FFNConfig, linear_flops, require
from pretrain.model.zaya_router import Controller, ZayaRouter


class ZayaMoEConfig(FFNConfig):
    kind: Literal["zaya_moe"] = "zaya_moe"
    experts: int = Field(ge=1)
    top_k: int = Field(1, ge=1)
    """Experts that each token uses; ZAYA1 uses 1."""
    hidden: int = Field(ge=1)
    """Hidden width of one expert."""
    router_width: int = Field(256, ge=1)
    """Width of the router's state and network; the same in all layers."""
    norm_eps: float = Field(1e-5, gt=0)
    """Of the router's norm."""
    skip: Literal["off", "zero", "identity"] = "off"
    """One more choice, which gives 0 or p * x instead of an expert's output."""
    skip_target: float | None = Field(None, gt=0, lt=1)
    """Share of the choices that the controller steers to skipping; left out, the same as an expert's."""
    bias_lr: float = Field(1e-3, ge=0)
    """The controller's step; 0 turns balancing off. Keep it below the spread of the probabilities among tokens: where one step
    outweighs it, all tokens move together from expert to expert."""
    bias_beta1: float = Field(0.9, ge=0, lt=1)
    bias_beta2: float = Field(0.95, ge=0, lt=1)
    bias_weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of the bias towards 0."""

    def controller(self) -> Controller:
        """Raises ValueError when skip_target is set without a skip choice."""
        require(
            self.skip_target is None or self.skip != "off",
            f"skip_target={self.skip_target} needs a skip choice; set skip to zero or identity, or leave skip_target out",
        )
        if self.skip == "off":
            target = [1 / self.experts] * self.experts
        else:
            skipped = 1 / (self.experts + 1) if self.skip_target is None else self.skip_target
            target = [(1 - skipped) / self.experts] * self.experts + [skipped]
        return Controller(self.bias_lr, self.bias_beta1, self.bias_beta2, self.bias_weight_decay, tuple(target))

    def build(self, width: int) -> ZayaMoE:
        return ZayaMoE(width, self)


class ZayaMoE(RoutedFFN):
    def __init__(self, width: int, config: ZayaMoEConfig):
        super().__init__(width, config.experts, config.top_k, config.hidden)
        self.skip, self.router_width = config.skip, config.router_width
        self.router = ZayaRouter(
            width, config.experts, config.top_k, config.router_width, config.norm_eps, config.controller()
        )

    def place(self, index: int, count: int) -> None:
        if index == 0:
            self.router.gamma = None  # no router state comes before it

    def forward(
        self, x: Tensor, sequence: SequenceContext, cache: dict[str, Any] | None, carry: Carry
    ) -> tuple[Tensor, Carry]:
        indices, scores, state = self.router(x, carry.router_state)
        y = self._experts(self._tokens(x), indices, scores)
        return y.view_as(x), carry._replace(router_state=state)

    @opaque  # how many skip differs from row to row
    def _experts(self, x: Tensor, indices: Tensor, scores: Tensor) -> Tensor:
        if self.skip == "off":
            return self.dispatch(x, self.gate_up, self.down, indices, scores)
        skipped = indices == self.experts
        # A skip in one of several places leaves a weight of zero at the neighbouring place's expert, which a choice of distinct
        # ones makes a real one; tokens whose every place is a skip do not travel at all.
        indices = indices.where(~skipped, indices.roll(1, dims=-1))
        kept = (~skipped).any(dim=-1).nonzero()[:, 0]
        weights = scores.masked_fill(skipped, 0.0)
        routed = self.dispatch(x[kept], self.gate_up, self.down, indices[kept], weights[kept])
        y = routed.new_zeros(x.shape).index_copy(0, kept, routed)
        if self.skip == "identity":
            y = y + scores.masked_fill(~skipped, 0.0).sum(dim=-1, keepdim=True).to(y.dtype) * x
        return y

    def flops_per_token(self, context: float) -> float:
        """Counts every token through top_k experts: an upper bound where tokens may skip."""
        router = self.router
        layers = (router.down, router.fc1, router.fc2, router.out)
        return linear_flops(*(layer.weight for layer in layers)) + self._routed_flops()
