"""The definition of the head's loss: all logits at once, torch's own cross_entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    reduction: str,
    chunk: int | None = None,
) -> Tensor:
    """The loss; see kernels.cross_entropy.linear_cross_entropy. `chunk` has no effect here."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = functional.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    losses = functional.cross_entropy(
        logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    kept = targets != ignore_index
    losses = losses + torch.where(kept, z_loss * logits.logsumexp(-1).square(), 0.0)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / kept.sum().clamp(min=1)
