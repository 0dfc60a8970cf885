"""One sequence over several ranks: what a rank tells the others, and what it makes of their words.

The delta rule is affine in the state. Over the tokens of one rank,

    S_end = M S_begin + S_zero,     M = product over tokens, later ones to the left, of (I − β k kᵀ) Diag(exp g)

with S_zero the end state from a zero start. Each rank summarises its tokens as (S_zero, M), all ranks exchange the
summaries once (HV · K · (V + K) fp32 numbers per row, whatever the length), each folds those before it into its own
initial state, and the ordinary operator does the rest. Source: the context parallelism of flash-linear-attention,
after LASP-2 (arXiv:2502.07563). All of it is differentiable: gradients reach other ranks' tokens through their
summaries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.delta_rule import delta_rule


def summarize(
    k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, *, normalize_qk: bool = False
) -> tuple[Tensor, Tensor]:
    """What a segment does to the state. k [B, T, H, K]; v [B, T, HV, V]; beta, g as in `delta_rule`.

    Returns the state from zero [B, HV, K, V] and the transition [B, HV, K, K], in fp32 (fp64 for fp64 inputs).
    """
    B, _, _, K = k.shape
    HV, V = v.shape[2:]
    # The columns of the state do not mix: with v = 0 and the identity as initial state the operator carries M itself.
    # Both run in one call, side by side along V; the queries are idle. All in fp32 (fp64 for fp64 inputs): the
    # transitions of many ranks are multiplied with each other.
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    k = k.to(wide)
    start = torch.cat([torch.zeros(K, V, dtype=wide), torch.eye(K, dtype=wide)], -1).to(k.device)
    _, state = delta_rule(
        torch.zeros_like(k),
        k,
        torch.nn.functional.pad(v.to(wide), (0, K)),
        beta,
        g,
        scale=1.0,
        initial_state=start.expand(B, HV, K, V + K),
        output_final_state=True,
        normalize_qk=normalize_qk,
    )
    assert state is not None
    return state[..., :V], state[..., V:]


def merge(summaries: Sequence[tuple[Tensor, Tensor]], initial_state: Tensor | None = None) -> Tensor | None:
    """The state after the segments summarised, first segment first; None for the first rank of a fresh sequence.

    summaries: (state from zero [B, HV, K, V], transition [B, HV, K, K]) of every segment before mine.
    initial_state [B, HV, K, V]: the state before the first of them, default zero.
    """
    state = initial_state
    with torch.autocast(summaries[0][0].device.type if summaries else "cpu", enabled=False):
        for from_zero, transition in summaries:
            state = from_zero if state is None else transition @ state.to(from_zero.dtype) + from_zero
    return state
