"""A running quantile per expert: the threshold above which a given share of all tokens lies."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.model.router import Balanced

SPAN, BINS = 12.0, 512  # log-odds in -SPAN..SPAN are told apart in this many bins, then interpolated


class Quantiles(Balanced):
    """odds [B, T, n] -> mask bool [B, T, n], odds >= threshold.

    The threshold is a buffer: frozen within a forward pass, so that no token's choice depends on another token. In training
    the log-odds are counted in a histogram; after a step, each expert's threshold moves by `rate` towards the (1 - share)
    quantile over the global batch. Counts add up over ranks and micro-batches: all ranks keep the same thresholds. Before
    the first step everything is selected; the first step's quantile is taken whole.
    """

    threshold: Tensor
    counts_experts = False

    def __init__(self, experts: int, share: float, rate: float):
        super().__init__()
        self.experts, self.share, self.rate = experts, share, rate
        self.register_buffer("threshold", torch.full((experts,), -SPAN))
        self.register_buffer("load", torch.zeros(experts * BINS, dtype=torch.int64), persistent=False)

    def forward(self, odds: Tensor, allowed: Tensor | None = None) -> Tensor:
        """allowed: bool [B, T, n]; what is not allowed is not selected, and counts as the lowest log-odds."""
        odds = odds.clamp(-SPAN, SPAN)
        if self.training and self.counting:
            self._count(odds if allowed is None else odds.masked_fill(~allowed, -SPAN))
        mask = odds >= self.threshold
        return mask if allowed is None else mask & allowed

    def _count(self, odds: Tensor) -> None:
        place = (odds.nan_to_num(-SPAN) + SPAN) * (BINS / (2 * SPAN))
        first = torch.arange(self.experts, device=odds.device) * BINS
        self.load += torch.bincount((place.long().clamp(max=BINS - 1) + first).flatten(), minlength=self.load.numel())

    @torch.no_grad()
    def rebalance(self, load: Tensor) -> None:
        """load: int64 [n * BINS], the histograms of the global batch; all zero moves nothing."""
        counts = load.view(self.experts, BINS).double()
        wanted = self.share * counts.sum(1, keepdim=True)
        above = counts.flip(1).cumsum(1).flip(1) - counts  # tokens in higher bins
        bin_ = (above < wanted).long().argmax(1, keepdim=True)  # the lowest bin that is needed
        inside = (wanted - above.gather(1, bin_)) / counts.gather(1, bin_).clamp(min=1)
        quantile = ((bin_ + 1 - inside) * (2 * SPAN / BINS) - SPAN)[:, 0].to(self.threshold.dtype)
        if self.share >= 1:
            quantile = torch.full_like(quantile, -SPAN)  # all tokens, also lower ones than have been seen
        moved = torch.lerp(self.threshold, quantile, self.rate)
        moved = torch.where(self.threshold <= -SPAN, quantile, moved)
        self.threshold.copy_(torch.where(wanted[:, 0] > 0, moved, self.threshold))
        self.load.zero_()
