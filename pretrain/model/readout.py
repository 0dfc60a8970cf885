"""From the decoder's last hidden states to logits or to the loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from kernels import linear_cross_entropy


class Readout:
    """Both ways out of the model, without state. Replaced from outside where ranks share out the vocabulary or the tokens."""

    def logits(self, x: Tensor, weight: Tensor, last_only: bool) -> Tensor:
        """x [B, T, D], normalised, and the head's weight [vocabulary, D] -> fp32 [B, T or 1, vocabulary]."""
        return functional.linear(x[:, -1:] if last_only else x, weight).float()

    def loss(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """x [B, T, D], normalised, weight [vocabulary, D], targets [B, T] -> summed cross entropy in nats, fp32 scalar."""
        return linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), reduction="sum")
