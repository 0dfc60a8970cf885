"""Routing in plain torch with a hand-written backward: of a sigmoid only the scores of the chosen are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.experts.routing import SMALL, Rule
from kernels.experts.routing_reference import all_scores, chosen


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
        scores = all_scores(logits, rule.gate)
        indices = chosen(scores if bias is None else scores + bias, rule)
        raw = scores.gather(-1, indices)
        ctx.rule, ctx.experts = rule, logits.shape[1]
        ctx.save_for_backward(indices, raw if rule.gate == "sigmoid" else scores)
        ctx.mark_non_differentiable(indices)
        weights = raw / (raw.sum(dim=-1, keepdim=True) + SMALL) if rule.normalize else raw
        return indices, weights * rule.scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        rule = ctx.rule
        indices, scores = ctx.saved_tensors
        raw = scores if rule.gate == "sigmoid" else scores.gather(-1, indices)
        d = upstream * rule.scale
        if rule.normalize:
            total = raw.sum(dim=-1, keepdim=True) + SMALL
            d = (d - (d * raw).sum(dim=-1, keepdim=True) / total) / total
        d = d * raw
        if rule.gate == "sigmoid":
            return raw.new_zeros(raw.shape[0], ctx.experts).scatter_(-1, indices, d * (1.0 - raw)), None, None
        mean = d.sum(dim=-1, keepdim=True)
        return torch.mul(scores, -mean).scatter_add_(-1, indices, d), None, None


def route_chunked(logits: Tensor, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """See `kernels.experts.routing.route`."""
    indices, weights = _Route.apply(logits, bias, rule)
    return indices, weights
