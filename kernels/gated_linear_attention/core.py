"""What the chunk form is made of, for any gate: the loop over segments, the scan of the state, the gate's gradient.

Sources: GLA (arXiv:2312.06635, section 4 and appendix C) and Mamba-2 (arXiv:2405.21060, section 6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.gated_linear_attention.operands import Operands
from kernels.gated_linear_attention.plan import Segment


@dataclass(frozen=True)
class Gradients:
    """To be filled, one token longer than the operands: dq, dk [.., H, K]; dv [.., H R, V]; dg as g, or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None


class Gate(Protocol):
    """One call's operands under its gate, worked on a segment at a time.

    state [N, H, K, R V], sorted, is moved in place from the segment's start to its end; dstate the other way.
    start [m H, K, R V]: the states that the chunks' queries read, written by `forward` and read by `backward`.
    """

    def forward(self, segment: Segment, state: Tensor, o: Tensor, start: Tensor | None) -> None: ...

    def backward(self, segment: Segment, do: Tensor, start: Tensor, dstate: Tensor, gradients: Gradients) -> None: ...

    def finish(self, gradients: Gradients) -> None:
        """After the last segment of the backward."""
        ...


def forward(x: Operands, gate: Gate, state: Tensor, o: Tensor, starts: Tensor | None) -> None:
    """Writes o [tokens + 1, H R, V] and moves `state` [N, H, K, R V] (sorted) to the end of each sequence.

    starts [M H, K, R V], if given, receives what `backward` needs of the states.
    """
    for segment in x.plan.segments(x.size):
        gate.forward(segment, state, o, None if starts is None else starts[segment.rows(x.H)])


def backward(x: Operands, gate: Gate, do: Tensor, starts: Tensor, dstate: Tensor, gradients: Gradients) -> None:
    """Fills `gradients`; dstate [N, H, K, R V] (sorted) turns from the final states' gradient into the initial states'.

    do [tokens, H R, V]; starts as `forward` gave them.
    """
    for segment in reversed(x.plan.segments(x.size)):
        gate.backward(segment, do, starts[segment.rows(x.H)], dstate, gradients)
    gate.finish(gradients)


def scan(
    segment: Segment,
    state: Tensor,
    kept: Tensor,
    a: Tensor,
    b: Tensor,
    total: Tensor | None,
    *,
    decayed: bool,
    backwards: bool = False,
) -> None:
    """state <- total state + a b, chunk by chunk, keeping in `kept` what the state was at each.

    state [N, H, K, R V], in place; kept [m H, K, R V]; a [m H, K, C]; b [m H, C, R V]; total [m H, K or 1, R V or 1] or
    None for 1. decayed: forwards, the state is kept after it has decayed; backwards, what is added decays with the rest.
    backwards: from the last chunk to the first.
    """
    H = state.shape[1]
    sizes = [n * H for n in segment.sizes]
    totals = [None] * len(sizes) if total is None else total.split(sizes)
    pieces = list(zip(segment.states(state), kept.split(sizes), a.split(sizes), b.split(sizes), totals))
    for views, before, left, right, decay in reversed(pieces) if backwards else pieces:
        here = views.flatten(0, 1)
        if decay is None:
            before.copy_(here)
            add_product_(here, left, right)
        elif not decayed:
            before.copy_(here)
            add_product_(here.mul_(decay), left, right)
        elif backwards:
            before.copy_(here)
            add_product_(here, left, right).mul_(decay)
        else:
            before.copy_(here.mul_(decay))
            add_product_(here, left, right)


def add_product_(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x += a b, batched, where x may be of a wider dtype than a and b."""
    return x.baddbmm_(a, b) if x.dtype == a.dtype else x.add_(torch.bmm(a, b))


def passages(read: Tensor, written: Tensor, past: Tensor) -> Tensor:
    """Gate gradients [M, C, ...] of what tokens from t on read, what tokens before t wrote, and what went past [M, ...].

    The gate's gradient at token t is what passes from tokens before t to tokens from t on. It is summed up from just these
    passages: from earlier chunks into this one, from this one into later ones, past it, and (by the gates) inside it. (The
    shorter Σ_{i >= t} (q_i·dq_i - k_i·dk_i) takes them as a difference of sums that also hold everything else, and is left
    with rounding noise where the decay is strong.)
    """
    dg = read.flip(1).cumsum(1).flip(1)
    dg[:, 1:] += written[:, :-1].cumsum(1)
    return dg.add_(past.unsqueeze(1))
