"""Losses that keep a router healthy, in nats summed over tokens: mean loss times number of tokens, like the cross entropy."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kernels.experts import load
from pretrain.model.router import unreduced


def batch_loss(affinity: Tensor, counts: Tensor) -> Tensor:
    """E sum_i f_i P_i, times N (Switch, arXiv 2101.03961, equation 4; over a global batch: arXiv 2501.11873). Even: 1 a token.

    affinity: [N, E], scores that sum to 1 for each token; P_i is their mean here. counts: [E], choices per expert, here or over
    more tokens than these; f_i is their share. (Some count f_i per token instead, which is k times ours for top-k.)
    """
    share = counts.to(affinity.dtype) / counts.sum().clamp(min=1)
    return affinity.shape[1] * (share * affinity.sum(dim=0)).sum()


def sequence_loss(
    affinity: Tensor, top_k: int, owner: Tensor, sequences: int, total: Callable[[Tensor], Tensor] = unreduced
) -> Tensor:
    """The same within each sequence, mean over a sequence's tokens times its length (DeepSeek-V3, equations 17 to 20).

    affinity: [N, E]. owner: int64 [N], the sequence of each token, 0 <= owner < sequences. As in the paper, f_i counts the choice
    that the scores alone would make, without bias or groups: the loss is there to even out the scores themselves.
    total: int64 [sequences, E], counts over these tokens -> counts over all tokens of the sequences, if there are more elsewhere.
    """
    E = affinity.shape[1]
    indices = affinity.detach().topk(top_k, dim=-1).indices
    counts = total(load(owner[:, None] * E + indices, sequences * E).view(sequences, E))
    share = counts.to(affinity.dtype) / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return E * (share[owner] * affinity).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Sum over tokens of log(sum exp(logits))^2 (ST-MoE, arXiv 2202.08906, equation 5). logits: [N, E]."""
    return logits.logsumexp(dim=-1).square().sum()
