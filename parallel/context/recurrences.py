"""What each recurrent operator does to a state over a span of tokens, said in few numbers that ranks can exchange.

All three are affine in the state before the span: after = transition(before) + state from zero. The delta rule's transition is
a matrix a head, the additive family's a decay (LASP-2, arXiv:2502.07563), the selective scan's a decay a channel and state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import delta_rule, gated_linear_attention, selective_scan
from kernels.delta_rule import context as delta_context
from kernels.gated_linear_attention import context as additive_context

Inputs = Sequence[Tensor | None]


class Law(NamedTuple):
    """summarize: (the operator's inputs over a span, its options) -> tensors [1, ...], the state from zero first.

    advance: (the state before a span, its summary, the operator's inputs) -> the state after it. Both are differentiable.
    """

    summarize: Callable[[Inputs, Mapping[str, Any]], tuple[Tensor, ...]]
    advance: Callable[[Tensor, tuple[Tensor, ...], Inputs], Tensor]


def _delta_summary(inputs: Inputs, options: Mapping[str, Any]) -> tuple[Tensor, ...]:
    _, k, v, beta, g = inputs
    assert k is not None and v is not None and beta is not None
    return delta_context.summarize(k, v, beta, g, normalize_qk=options.get("normalize_qk", False))


def _delta_advance(state: Tensor, summary: tuple[Tensor, ...], inputs: Inputs) -> Tensor:
    after = delta_context.merge([(summary[0], summary[1])], state)
    assert after is not None
    return after


def _additive_summary(inputs: Inputs, options: Mapping[str, Any]) -> tuple[Tensor, ...]:
    _, k, v, g = inputs
    assert k is not None and v is not None
    state, decay = additive_context.summarize(k, v, g)
    return (state,) if decay is None else (state, decay)


def _additive_advance(state: Tensor, summary: tuple[Tensor, ...], inputs: Inputs) -> Tensor:
    decay = summary[1] if len(summary) > 1 else None
    return additive_context.advance(state, additive_context.Summary(summary[0], decay))


def _scan_summary(inputs: Inputs, options: Mapping[str, Any]) -> tuple[Tensor, ...]:
    x, dt, A, B = inputs[:4]
    assert x is not None and dt is not None and A is not None and B is not None
    wide = torch.promote_types(x.dtype, torch.float32)
    _, state = selective_scan(x, dt, A, B, torch.zeros_like(B), output_final_state=True)
    assert state is not None
    return state, dt.to(wide).sum(1)


def _scan_advance(state: Tensor, summary: tuple[Tensor, ...], inputs: Inputs) -> Tensor:
    A = inputs[2]
    assert A is not None
    return state * (summary[1][..., None] * A.to(state.dtype)).exp() + summary[0]


LAWS: dict[Callable[..., Any], Law] = {
    delta_rule: Law(_delta_summary, _delta_advance),
    gated_linear_attention: Law(_additive_summary, _additive_advance),
    selective_scan: Law(_scan_summary, _scan_advance),
}


def law_of(operator: Callable[..., Any]) -> Law:
    """Raises ValueError for an operator that nobody has said how to cut."""
    if operator not in LAWS:
        name = getattr(operator, "__name__", operator)
        raise ValueError(
            f"mesh.cp: no context-parallel form of {name}; use mesh.cp=1, or add its law in parallel/context/recurrences.py"
        )
    return LAWS[operator]
