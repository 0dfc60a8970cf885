"""What an operator with a backward of its own keeps for it, found by running its real form on a few tokens and heads.

The tensors that such operators keep grow with tokens and with heads (or channels), and with nothing else. So four small runs tell
how much: a + b tokens + c heads + d tokens heads. On a GPU the Triton forms run: their launches are left out here, which changes
values and no shape. On a CPU, where the forms cut their work by the cache's size, the call itself runs, or the beginning of it.
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

from kernels import delta_rule, gated_linear_attention, selective_scan, short_convolution
from kernels.architecture import assume
from kernels.dispatch import Form, Request, interpreting
from kernels.offline.choice import choosing
from pretrain.estimate.memory import Memory, outside

TOKENS = 128  # a multiple of every form's chunk
MOST = 1 << 21  # elements of the inputs of a run on a CPU
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
    short_convolution: (2, 0, 0),
}


@dataclass(frozen=True)
class Grows:
    """A number of bytes for so many tokens and so many groups of heads: the fewest heads that an operator can be called with."""

    constant: float
    per_token: float
    per_group: float
    per_both: float

    @classmethod
    def through(cls, one: int, more_groups: int, more_tokens: int, both: int) -> Grows:
        """From runs with TOKENS or twice as many, and one group or two."""
        per_both = (both - more_tokens - more_groups + one) / TOKENS
        per_token, per_group = (more_tokens - one) / TOKENS - per_both, more_groups - one - per_both * TOKENS
        return cls(one - per_token * TOKENS - per_group - per_both * TOKENS, per_token, per_group, per_both)

    def __call__(self, tokens: int, groups: int) -> int:
        number = self.constant + self.per_token * tokens + (self.per_group + self.per_both * tokens) * groups
        return max(0, round(number))


class Ran(NamedTuple):
    """A small run: which inputs are kept as they are; bytes of what else is kept, and of what is needed for a moment in the
    forward and in the backward pass; the output."""

    inputs: tuple[bool, ...]
    extra: int
    forward: int
    backward: int
    output: Like


class Stand(torch.autograd.Function):
    """Stands for an operator: gives `output`, keeps what the operator would, and hands back gradients. No arithmetic.

    keeps: which inputs are kept; extra: bytes besides; scratch: for a moment, in the forward and in the backward pass; of_output:
    whether the output is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Like,
        keeps: Sequence[bool],
        extra: int,
        scratch: tuple[int, int],
        of_output: bool,
        *inputs: Any,
    ) -> Tensor:
        first = next(x for x in inputs if x is not None)
        y = first.new_empty(output.shape, dtype=output.dtype)
        kept = [x for x, keep in zip(inputs, keeps) if keep and x is not None]
        ctx.save_for_backward(*kept, y if of_output else None, first.new_empty(extra, dtype=torch.uint8))
        ctx.inputs = [None if x is None else (x.shape, x.dtype) for x in inputs]
        ctx.scratch = scratch[1]
        first.new_empty(scratch[0], dtype=torch.uint8)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        wanted = ctx.needs_input_grad[5:]
        gradients = [
            dy.new_empty(like[0], dtype=like[1]) if want and like is not None else None
            for want, like in zip(wanted, ctx.inputs)
        ]
        dy.new_empty(ctx.scratch, dtype=torch.uint8)
        return None, None, None, None, None, *gradients


def stand(
    output: Like,
    inputs: Sequence[Tensor | None],
    keeps: Sequence[bool],
    extra: int = 0,
    scratch: tuple[int, int] = (0, 0),
    of_output: bool = False,
) -> Tensor:
    """The output of an operator that is not run."""
    y: Tensor = Stand.apply(output, tuple(keeps), extra, scratch, of_output, *inputs)
    return y


def recur(
    operator: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    options: dict[str, Any],
    sequences: int,
    gpu: bool,
) -> Tensor:
    """An operator of `kernels` along [1, T, ...] inputs of packed sequences: its output, not computed, with what it keeps."""
    heads = HEADS.get(operator)
    head = inputs[0]
    assert head is not None
    if heads is None:  # unknown here: keeps its inputs and as much again as its output
        like = Like(tuple(head.shape), head.dtype)
        return stand(like, inputs, [x is not None for x in inputs], head.numel() * head.element_size())
    heads = heads[: len(inputs)]
    counts = [x.shape[dim] for x, dim in zip(inputs, heads) if x is not None and dim is not None]
    groups = functools.reduce(math.gcd, counts)
    likes = tuple(None if x is None else _few(x, dim, groups) for x, dim in zip(inputs, heads))
    call = _Call(operator, likes, heads, tuple(sorted(options.items())), gpu)
    T = head.shape[1]
    if gpu:
        runs = [_ran(call, tokens, few) for tokens in (TOKENS, 2 * TOKENS) for few in (1, 2)]
        kept, output = runs[0].inputs, runs[0].output
        sizes = ([run.extra for run in runs], [run.forward for run in runs], [run.backward for run in runs])
        extra, forward, backward = (Grows.through(*each)(T, groups) for each in sizes)
        channels = output.shape[2] * groups
    else:
        # Worked through in blocks that fit the cache: as it is, or, where that would take long, the beginning of it.
        size = sum(math.prod(x.shape) for x in inputs if x is not None)
        tokens = min(T, max(TOKENS, T * MOST // max(size, 1) // TOKENS * TOKENS))
        run = _ran(call, tokens, groups, max(1, sequences * tokens // T))
        kept, output, channels = run.inputs, run.output, run.output.shape[2]
        extra, forward, backward = run.extra * T // tokens, run.forward, run.backward
    # Packed sequences each end in a chunk of their own: lengths that no chunk divides cost a part of one.
    shape = (*head.shape[:2], channels, *output.shape[3:])
    return stand(Like(shape, output.dtype), inputs, kept, extra, (forward, backward))


def _few(x: Tensor, dim: int | None, groups: int) -> Like:
    """An input with as few heads as can be; its number of tokens does not matter."""
    shape = list(x.shape)
    if dim is not None:
        shape[dim] //= groups
    if len(shape) >= 3:  # the others are parameters
        shape[1] = 0
    return Like(tuple(shape), x.dtype, x.is_contiguous())


class _Call(NamedTuple):
    """likes: the inputs with as few heads as can be, and any number of tokens."""

    operator: Callable[..., Any]
    likes: tuple[Like | None, ...]
    heads: tuple[int | None, ...]
    options: tuple[tuple[str, Any], ...]
    gpu: bool


@functools.cache
def _ran(call: _Call, tokens: int, groups: int, sequences: int = 1) -> Ran:
    sized = [None if x is None else _sized(x, dim, tokens, groups) for x, dim in zip(call.likes, call.heads)]
    with _real_forms(call.gpu):
        return outside(lambda: _run(call.operator, sized, dict(call.options), tokens, sequences))


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
    operator: Callable[..., Any], likes: Sequence[Like | None], options: dict[str, Any], tokens: int, sequences: int
) -> Ran:
    borders = torch.tensor([tokens * i // sequences for i in range(sequences + 1)], dtype=torch.int32)
    leaf = torch.ones((), requires_grad=True)
    with torch.enable_grad(), Memory() as memory:
        # In a graph, but nobody's leaves: what is not kept goes.
        given = [None if x is None else _Given.apply(leaf, x) for x in likes]
        names = [None if x is None else memory.held(x) for x in given]
        gradients = sum(x.numel() * x.element_size() for x in given if x is not None)
        before = memory.live
        memory.begin()
        o, _ = operator(*given, cu_seqlens=borders, **options)
        peak = memory.peak - before
        given.clear()
        kept = tuple(name is not None and memory.alive(name[0]) for name in names)
        own = memory.held(o)[1]
        extra = memory.live - own - sum(name[1] for name, keep in zip(names, kept) if keep and name is not None)
        output = Like(tuple(o.shape), o.dtype)
        dy = torch.empty_like(o, memory_format=torch.contiguous_format)
        before = memory.live
        memory.begin()
        torch.autograd.backward(o, dy)
        return Ran(kept, extra, max(0, peak - own - extra), max(0, memory.peak - before - gradients), output)


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, like: Like) -> Tensor:
        return _made(like)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return None, None


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
    JITFunction.run = lambda *args, **kwargs: None
    try:
        yield
    finally:
        JITFunction.run = launch
