"""Top-k token-choice routing with auxiliary-loss-free balancing (Wang et al. 2024, arXiv 2408.15664).

A bias per expert is added to the scores for the choice only, never to the combine weights; after each optimizer step it moves
by a fixed rate towards the experts that got less than their share of the global batch.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.experts import load

Gate = Literal["sigmoid", "softmax"]


class Balanced(nn.Module):
    """A router whose choice the trainer balances: it counts its load, and after a step is told the load of the global batch."""

    load: Tensor
    """int64 [E], tokens per expert since the last balancing: bookkeeping of one step, empty at every checkpoint."""

    def rebalance(self, load: Tensor) -> None:
        """Moves the bias by the load of the global batch [E], and starts counting anew."""
        raise NotImplementedError


class Router(Balanced):
    """x [N, D] -> (indices int64 [N, k], scores fp32 [N, k] that sum to `scale` for each token)."""

    bias: Tensor

    def __init__(self, width: int, experts: int, top_k: int, gate: Gate, scale: float, bias_rate: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.top_k, self.gate, self.scale, self.bias_rate = top_k, gate, scale, bias_rate
        self.register_buffer("bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts, dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        self.weight.normal_(0.0, std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # fp32 whatever the autocast: a rounded logit would choose another expert.
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
            scores = logits.sigmoid() if self.gate == "sigmoid" else logits.softmax(dim=-1)
            indices = (scores.detach() + self.bias).topk(self.top_k, dim=-1).indices
            chosen = scores.gather(-1, indices)
            chosen = chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20) * self.scale
        if self.training:
            self.load += load(indices, self.load.numel())
        return indices, chosen

    @torch.no_grad()
    def rebalance(self, load: Tensor) -> None:
        share = load.float()
        self.bias += self.bias_rate * (share.mean() - share).sign()
        self.load.zero_()
