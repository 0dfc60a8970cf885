"""Losses that keep a router healthy, in nats summed over tokens: mean loss times number of tokens, like the cross entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.experts import load
from pretrain.model.sequence import SequenceContext


def batch_loss(affinity: Tensor, counts: Tensor) -> Tensor:
    """E sum_i f_i P_i, times N (Switch, arXiv 2101.03961, equation 4; over a global batch: arXiv 2501.11873). Even: 1 a token.

    affinity: [N, E], scores that sum to 1 for each token; P_i is their mean here. counts: [E], choices per expert, here or over
    more tokens than these; f_i is their share. (Some count f_i per token instead, which is k times ours for top-k.)
    """
    share = counts.to(affinity.dtype) / counts.sum().clamp(min=1)
    return affinity.shape[1] * (share * affinity.sum(dim=0)).sum()


def sequence_loss(affinity: Tensor, top_k: int, owner: Tensor, sequences: int) -> Tensor:
    """The same within each sequence, mean over a sequence's tokens times its length (DeepSeek-V3, equations 17 to 20).

    affinity: [N, E]. owner: int64 [N], the sequence of each token, 0 <= owner < sequences. As in the paper, f_i counts the choice
    that the scores alone would make, without bias or groups: the loss is there to even out the scores themselves.
    """
    E = affinity.shape[1]
    indices = affinity.detach().topk(top_k, dim=-1).indices
    counts = load(owner[:, None] * E + indices, sequences * E).view(sequences, E)
    lengths = torch.bincount(owner, minlength=sequences)
    share = counts.to(affinity.dtype) / (top_k * lengths[:, None].clamp(min=1))
    return E * (share[owner] * affinity).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Sum over tokens of log(sum exp(logits))^2 (ST-MoE, arXiv 2202.08906, equation 5). logits: [N, E]."""
    return logits.logsumexp(dim=-1).square().sum()


def owners(sequence: SequenceContext) -> tuple[Tensor, int]:
    """(the sequence of each token, int64 [N]; how many there are), tokens in the order of x.flatten(0, -2)."""
    B, T = sequence.positions.shape
    if sequence.cu_seqlens is None:
        return torch.arange(B * T, device=sequence.positions.device) // T, B
    lengths = sequence.cu_seqlens.diff().long()
    numbers = torch.arange(lengths.numel(), device=lengths.device)
    return numbers.repeat_interleave(lengths, output_size=T), lengths.numel()
