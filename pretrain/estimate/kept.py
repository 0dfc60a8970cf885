"""What an operator with a backward of its own keeps for it, found by running its real form on a few tokens and heads.

The tensors that such operators keep grow with tokens and with heads (or channels), and with nothing else. So four small runs tell
how much: a + b tokens + c heads + d tokens heads. On a GPU the Triton forms run: their launches are left out here, which changes
values and no shape.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import delta_rule, gated_linear_attention, selective_scan
from kernels.architecture import assume
from kernels.dispatch import Form, Request, interpreting
from kernels.offline.choice import choosing
from pretrain.estimate.memory import Memory, outside

TOKENS = 128  # a multiple of every form's chunk
GPU = "sm90"  # whose Triton kernels stand for those of all GPUs: what they keep does not depend on it


class Like(NamedTuple):
    """A tensor's shape and dtype, and whether it lies in one piece: operators copy some that do not."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    whole: bool = True


# Of each operator's inputs, in order: the dim that counts heads or channels, which may be few in a small run; None: has none.
HEADS: dict[Callable[..., Any], tuple[int | None, ...]] = {
    delta_rule: (2, 2, 2, 2, 2),
    gated_linear_attention: (2, 2, 2, 2),
    selective_scan: (2, 2, 0, None, None, 0),
}


@dataclass(frozen=True)
class Kept:
    """inputs: which of the inputs are kept as they are. The rest, in bytes, for a number of tokens and heads or channels."""

    inputs: tuple[bool, ...]
    constant: float
    per_token: float
    per_head: float
    per_both: float

    def extra(self, tokens: int, heads: float) -> int:
        """heads: groups of heads, as many as make up the smallest call with the same numbers of key and value heads."""
        return round(self.constant + self.per_token * tokens + (self.per_head + self.per_both * tokens) * heads)


class Stand(torch.autograd.Function):
    """Stands for an operator: gives `output`, keeps what the operator would, and hands back gradients. No arithmetic.

    keeps: which inputs are kept; extra: bytes besides; of_output: whether the output is kept.
    """

    @staticmethod
    def forward(ctx: Any, output: Like, keeps: Sequence[bool], extra: int, of_output: bool, *inputs: Any) -> Tensor:
        first = next(x for x in inputs if x is not None)
        y = first.new_empty(output.shape, dtype=output.dtype)
        kept = [x for x, keep in zip(inputs, keeps) if keep and x is not None]
        ctx.save_for_backward(*kept, y if of_output else None, first.new_empty(extra, dtype=torch.uint8))
        ctx.inputs = [None if x is None else (x.shape, x.dtype) for x in inputs]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        wanted = ctx.needs_input_grad[4:]
        gradients = (
            dy.new_empty(like[0], dtype=like[1]) if want and like is not None else None
            for want, like in zip(wanted, ctx.inputs)
        )
        return None, None, None, None, *gradients


def stand(
    output: Like, inputs: Sequence[Tensor | None], keeps: Sequence[bool], extra: int = 0, of_output: bool = False
) -> Tensor:
    """The output of an operator that is not run."""
    y: Tensor = Stand.apply(output, tuple(keeps), extra, of_output, *inputs)  # type: ignore[no-untyped-call]
    return y


def recur(operator: Callable[..., Any], inputs: Sequence[Tensor | None], options: dict[str, Any], gpu: bool) -> Tensor:
    """A recurrent operator of `kernels` on [1, T, ...] inputs: its output, not computed, with what it keeps."""
    heads = HEADS.get(operator)
    head = inputs[0]
    assert head is not None
    if heads is None:  # unknown here: keeps its inputs and as much again as its output
        return stand(
            Like(tuple(head.shape), head.dtype),
            inputs,
            [x is not None for x in inputs],
            head.numel() * head.element_size(),
        )
    heads = heads[: len(inputs)]
    counts = [x.shape[dim] for x, dim in zip(inputs, heads) if x is not None and dim is not None]
    groups = functools.reduce(math.gcd, counts)
    likes = tuple(None if x is None else _few(x, dim, groups) for x, dim in zip(inputs, heads))
    kept, output = _measure(operator, likes, heads, tuple(sorted(options.items())), gpu)
    T = head.shape[1]
    # Packed sequences each end in a chunk of their own: lengths that no chunk divides cost a part of one.
    shape = (*head.shape[:2], output.shape[2] * groups, *output.shape[3:])
    return stand(Like(shape, output.dtype), inputs, kept.inputs, kept.extra(T, groups))


def _few(x: Tensor, dim: int | None, groups: int) -> Like:
    """An input with as few heads as can be; its number of tokens does not matter."""
    shape = list(x.shape)
    if dim is not None:
        shape[dim] //= groups
    if len(shape) >= 3:  # the others are parameters
        shape[1] = 0
    return Like(tuple(shape), x.dtype, x.is_contiguous())


@functools.cache
def _measure(
    operator: Callable[..., Any],
    likes: tuple[Like | None, ...],
    heads: tuple[int | None, ...],
    options: tuple[tuple[str, Any], ...],
    gpu: bool,
) -> tuple[Kept, Like]:
    """likes: the inputs with as few heads as can be, and any number of tokens."""
    extras: dict[tuple[int, int], int] = {}
    inputs: tuple[bool, ...] = ()
    output = Like((), torch.float32)
    with outside(), _real_forms(gpu):
        for tokens in (TOKENS, 2 * TOKENS):
            for groups in (1, 2):
                few = [None if x is None else _sized(x, dim, tokens, groups) for x, dim in zip(likes, heads)]
                inputs, extras[tokens, groups], made = _run(operator, few, dict(options), tokens)
                if groups == 1:
                    output = made
    a, b, c, d = (extras[t, g] for t in (TOKENS, 2 * TOKENS) for g in (1, 2))
    both = (d - c - b + a) / TOKENS
    per_token, per_head = (c - a) / TOKENS - both, (b - a) - both * TOKENS
    return Kept(inputs, a - per_token * TOKENS - per_head - both * TOKENS, per_token, per_head, both), output


def _sized(like: Like, dim: int | None, tokens: int, groups: int) -> Like:
    shape = list(like.shape)
    if dim is not None:
        shape[dim] *= groups
    if len(shape) >= 3:  # the others are parameters
        shape[1] = tokens
    return Like(tuple(shape), like.dtype, like.whole)


def _made(like: Like) -> Tensor:
    if like.whole:
        return torch.zeros(like.shape, dtype=like.dtype)
    *shape, last = like.shape
    return torch.zeros(*shape, 2 * last, dtype=like.dtype)[..., :last]


def _run(
    operator: Callable[..., Any], likes: Sequence[Like | None], options: dict[str, Any], tokens: int
) -> tuple[tuple[bool, ...], int, Like]:
    """(which inputs are kept, bytes of what else is, the output)."""
    borders = torch.tensor([0, tokens], dtype=torch.int32)
    leaf = torch.ones((), requires_grad=True)
    with torch.enable_grad(), Memory() as memory:
        # In a graph, but nobody's leaves: what is not kept goes.
        given = [None if x is None else _Given.apply(leaf, x) for x in likes]  # type: ignore[no-untyped-call]
        names = [None if x is None else memory.held(x) for x in given]
        o, _ = operator(*given, cu_seqlens=borders, **options)
        given.clear()
        kept = tuple(name is not None and memory.alive(name[0]) for name in names)
        own = memory.held(o)[1]
        extra = memory.live - own - sum(name[1] for name, keep in zip(names, kept) if keep and name is not None)
        return kept, extra, Like(tuple(o.shape), o.dtype)


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, like: Like) -> Tensor:
        return _made(like)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        raise AssertionError("nothing goes back here")


def chosen(forms: Sequence[Form], request: Request) -> Form | None:
    """The form that is measured at this moment; None when none is."""
    return None if _choice is None else _choice(forms, request)


_choice: Callable[[Sequence[Form], Request], Form] | None = None


@contextmanager
def _real_forms(gpu: bool) -> Iterator[None]:
    """Within it, operators take the forms of a CPU, or those that they take on a GPU; then Triton launches nothing."""
    global _choice

    def choice(forms: Sequence[Form], request: Request) -> Form:
        there = dataclasses.replace(request, device=torch.device("cuda" if gpu else "cpu"))
        return next(form for form in forms if form.why_not(there) is None)

    gpu = gpu and importlib.util.find_spec("triton") is not None and not interpreting()
    before, _choice = _choice, choice
    try:
        with choosing(choice), assume(GPU) if gpu else nullcontext(), _no_launches() if gpu else nullcontext():
            yield
    finally:
        _choice = before


@contextmanager
def _no_launches() -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run
    JITFunction.run = lambda *args, **kwargs: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        JITFunction.run = launch  # type: ignore[method-assign]
