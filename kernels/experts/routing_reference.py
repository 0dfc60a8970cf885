"""The definition of routing."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.experts.routing import SMALL, Rule


def all_scores(logits: Tensor, gate: str) -> Tensor:
    return logits.sigmoid() if gate == "sigmoid" else logits.softmax(dim=-1)


def chosen(preference: Tensor, rule: Rule) -> Tensor:
    """preference [N, E] -> the k best of each token, int64 [N, k]."""
    if rule.groups > 1:
        grouped = preference.unflatten(-1, (rule.groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(rule.top_groups, dim=-1).indices
        closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
        preference = grouped.masked_fill(closed[..., None], float("-inf")).flatten(-2)
    if rule.top_k == 1:  # argmax takes the first of equals, topk any of them
        return preference.argmax(dim=-1, keepdim=True)
    return preference.topk(rule.top_k, dim=-1).indices


def route_reference(logits: Tensor, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """See `kernels.experts.routing.route`."""
    scores = all_scores(logits, rule.gate)
    preference = scores.detach() if bias is None else scores.detach() + bias
    indices = chosen(preference, rule)
    weights = scores.gather(-1, indices)
    if rule.normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + SMALL)
    return indices, weights * rule.scale
