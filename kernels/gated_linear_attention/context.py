"""Joining spans of one sequence whose states were computed apart, as context parallelism does (LASP-2, arXiv:2502.07563).

The state after a span is linear in the state before it: S_after = Diag(exp(G)) S_before + S_span, with G the span's total
log decay and S_span its state from zero. So each span is summarised by (S_span, G) on its own, summaries are put together
in any grouping, and each span then runs from the state before it. All functions are plain torch and differentiable.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Summary(NamedTuple):
    """state [B, HV, K, V]: after the span, from a zero state. decay: its total log decay, None, [B, HV] or [B, HV, K]."""

    state: Tensor
    decay: Tensor | None


def summarize(k: Tensor, v: Tensor, g: Tensor | None) -> Summary:
    """What a span does to the state. k [B, T, H, K]; v [B, T, HV, V]; g None, [B, T, HV] or [B, T, HV, K].

    In fp32 at least. A span of packed sequences: give the tokens of its last sequence only.
    """
    with torch.autocast(k.device.type, enabled=False):
        wide = torch.promote_types(k.dtype, torch.float32)
        B, T, H, K = k.shape
        HV, V = v.shape[2:]
        k, v = k.to(wide), v.to(wide)
        decay = None
        if g is not None:
            g = g.to(wide)
            decay = g.sum(1)
            # What lies after each token: a sum of its own, since a difference of two sums would cancel.
            later = torch.cat([g[:, 1:], torch.zeros_like(g[:, :1])], 1).flip(1).cumsum(1).flip(1).exp()
            if g.dim() == 3:
                v = v * later[..., None]
            else:
                k = k.repeat_interleave(HV // H, dim=2) * later
                H = HV
        keys = k.permute(0, 2, 3, 1)  # [B, H, K, T]
        values = v.view(B, T, H, HV // H * V).transpose(1, 2)
        state = torch.matmul(keys, values).view(B, H, K, HV // H, V).transpose(2, 3)
        return Summary(state.reshape(B, HV, K, V), decay)


def advance(state: Tensor, summary: Summary) -> Tensor:
    """The state after a span, from the state [B, HV, K, V] before it."""
    if summary.decay is None:
        return state + summary.state
    weight = summary.decay.exp()
    while weight.dim() < state.dim():
        weight = weight[..., None]
    return state * weight + summary.state


def merge(earlier: Summary, later: Summary) -> Summary:
    """The summary of two spans in a row. Associative."""
    decay = None
    if earlier.decay is not None and later.decay is not None:
        decay = earlier.decay + later.decay
    return Summary(advance(earlier.state, later), decay)


def states_before(summaries: Iterable[Summary], initial_state: Tensor | None = None) -> list[Tensor]:
    """The state before each span, and after the last one: one more than there are spans. Zero first without initial_state."""
    states: list[Tensor] = []
    for summary in summaries:
        if not states:
            states.append(torch.zeros_like(summary.state) if initial_state is None else initial_state)
        states.append(advance(states[-1], summary))
    return states
