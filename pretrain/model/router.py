"""Routers: which experts each token goes to, and with what weight.

Sigmoid scores balanced by a bias on the choice alone (Wang et al. 2024, arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437), or
softmax scores. The bias decides who is chosen, never how much the chosen weigh, so it puts nothing into the gradient. It is
moved by the trainer after each step from the load of the whole global batch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.experts import load, route

Gate = Literal["sigmoid", "softmax"]


class Balanced(nn.Module):
    """A router whose choice the trainer balances: it counts its load, and after a step is told the load of the global batch."""

    load: Tensor
    """int64 [C], tokens per choice since the last balancing: bookkeeping of one step, empty at every checkpoint."""
    skips = 0
    """How many of the last entries of load are no experts, but count tokens that chose to skip."""
    counting = True
    """False: this is a copy of a router that sees the same tokens, and whose load is enough."""
    counts_experts = True
    """False: load is something else to add up over ranks, a histogram for instance, and its evenness means nothing."""

    def rebalance(self, load: Tensor) -> None:
        """Moves the bias by the load of the global batch [C], and starts counting anew. A load of zeros moves nothing."""
        raise NotImplementedError


def unreduced(load: Tensor) -> Tensor:
    """For a single process: it sees its own load only."""
    return load


class Routing(NamedTuple):
    """What a router decided for N tokens.

    indices: int64 [N, k]; scores: fp32 [N, k], the weights of the chosen. logits: fp32 [N, E].
    """

    indices: Tensor
    scores: Tensor
    logits: Tensor
    gate: Gate

    @property
    def affinity(self) -> Tensor:
        """fp32 [N, E], the scores of all experts before choice and bias, each token's summing to 1. Computed when asked for."""
        with torch.autocast(self.logits.device.type, enabled=False):
            if self.gate == "softmax":
                return self.logits.softmax(dim=-1)
            scores = self.logits.sigmoid()
            return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)


class Router(Balanced):
    """x [N, D] -> (indices int64 [N, k], scores fp32 [N, k]): k experts of E by score + bias.

    normalize: the scores of the chosen sum to `scale` for each token; otherwise they are scale times what they were among all.
    groups, top_groups: experts lie in equal groups of neighbours, and only the top_groups groups whose two best experts have the
    largest sum may be chosen from (DeepSeek-V3, section 2.1.2).
    """

    bias: Tensor

    def __init__(
        self,
        width: int,
        experts: int,
        top_k: int,
        gate: Gate,
        scale: float,
        bias_rate: float,
        *,
        normalize: bool = True,
        groups: int = 1,
        top_groups: int = 1,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.experts, self.top_k, self.gate, self.scale, self.bias_rate = experts, top_k, gate, scale, bias_rate
        self.normalize, self.groups, self.top_groups = normalize, groups, top_groups
        self.register_buffer("bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts, dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        self.weight.normal_(0.0, std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        routing = self.route(x)
        return routing.indices, routing.scores

    def route(self, x: Tensor) -> Routing:
        """x [N, D] -> the choice, and what balancing losses need besides. Counts the load in training."""
        # fp32 (or wider) whatever the autocast: a rounded logit would choose another expert.
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(wide), self.weight.to(wide))
            indices, scores = route(
                logits,
                self.bias,
                top_k=self.top_k,
                gate=self.gate,
                normalize=self.normalize,
                scale=self.scale,
                groups=self.groups,
                top_groups=self.top_groups,
            )
        if self.training:
            self.load += load(indices, self.load.numel())
        return Routing(indices, scores, logits, self.gate)

    @torch.no_grad()
    def rebalance(self, load: Tensor) -> None:
        share = load.float()
        self.bias += self.bias_rate * (share.mean() - share).sign()
        self.load.zero_()
