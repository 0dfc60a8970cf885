"""One layer's forward and backward pass on tensors without values: what it keeps, needs besides, sends and multiplies.

The layer's own code runs, with autocast and recomputation as in a run, on fake tensors: shapes and lifetimes are right, nothing
is computed. Operators and neighbours are replaced by stand-ins (stand_in/). Every number is a constant plus so much a token, so
two traces of different lengths say it for all lengths.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import once_differentiable

from parallel.recompute import Mode, apply_recompute
from pretrain.estimate.flops import per_token
from pretrain.estimate.memory import Memory
from pretrain.estimate.parameters import Cutting
from pretrain.estimate.stand_in import Message, Notes, Product, TracedSequence, connect, cut, operators
from pretrain.model.block import Block
from pretrain.model.sublayer import Carry

aten = torch.ops.aten


@dataclass(frozen=True)
class Measured:
    """Bytes of one layer for some number of tokens.

    inner: kept for the backward pass, without the tensors that come in and go out. weights: besides, copies of weights in low
    precision, which autocast keeps until the model's forward pass ends. stream, state: of what comes in (the residual stream, the
    router's state) as far as it is kept; own_stream, own_state: of what goes out, as far as this layer itself keeps it. forward:
    the most at a time in the forward pass, all of these included; backward: in the backward pass, where gradients of parameters
    are added to those that are there; fresh: where there are none, and they stay. shared: tables that all layers share.
    products: FLOPs of the forward pass's matrix products, where only a sublayer is recomputed, of that one's; again: of those
    that recomputation does once more.
    """

    inner: float
    weights: float
    stream: float
    state: float
    own_stream: float
    own_state: float
    forward: float
    backward: float
    fresh: float
    shared: float
    products: float
    again: float


@dataclass(frozen=True)
class Traced:
    """A layer: measured(tokens), messages(tokens) and products(tokens), tokens being those of a mixer on one rank."""

    tokens: tuple[int, int]
    both: tuple[Measured, Measured]
    sent: tuple[tuple[Message, ...], tuple[Message, ...]]
    multiplied: tuple[tuple[Product, ...], tuple[Product, ...]]

    def _at(self, tokens: int, values: tuple[float, float]) -> float:
        (a, b), (x, y) = self.tokens, values
        return x if x == y else x + (y - x) * (tokens - a) / (b - a)

    def measured(self, tokens: int) -> Measured:
        one, two = self.both
        names = (field.name for field in fields(Measured))
        return Measured(**{name: self._at(tokens, (getattr(one, name), getattr(two, name))) for name in names})

    def messages(self, tokens: int) -> list[Message]:
        return [
            replace(a, bytes=self._at(tokens, (a.bytes, b.bytes)), wide=self._at(tokens, (a.wide, b.wide)))
            for a, b in zip(*self.sent, strict=True)
        ]

    def products(self, tokens: int) -> list[Product]:
        return [replace(a, rows=self._at(tokens, (a.rows, b.rows))) for a, b in zip(*self.multiplied, strict=True)]


@dataclass(frozen=True)
class Way:
    """How a layer is run. gpu: by the operators' forms for GPUs."""

    cutting: Cutting
    recompute: Mode
    bf16: bool
    gpu: bool


def trace(block: Block, width: int, state: int, length: int, way: Way) -> Traced:
    """block: whole, on the meta device; it stays as it is. state: channels of the router's state that comes in, 0 for none.

    length: tokens of a sequence. Raises ValueError for a layer that cannot be followed without values.
    """
    length = -(-length // way.cutting.tp) * way.cutting.tp
    try:
        one, two = (_Run(block, width, state, length, count, way).result() for count in (1, 2))
    except (RuntimeError, NotImplementedError) as error:
        kinds = " + ".join(type(part).__name__ for part in block.sublayers())
        raise ValueError(f"the memory of {kinds} cannot be counted: {' '.join(str(error).split())[:300]}") from error
    return Traced((length, 2 * length), (one[0], two[0]), (one[1], two[1]), (one[2], two[2]))


class _End(torch.autograd.Function):
    """The rest of the model, which hands back gradients and keeps nothing."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.likes = [(x.shape, x.dtype) for x in outputs]
        return outputs[0].new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return tuple(dy.new_empty(shape, dtype=dtype) for shape, dtype in ctx.likes)


class _Run:
    def __init__(self, block: Block, width: int, state: int, length: int, count: int, way: Way):
        self.whole, self.width, self.state, self.way = block, width, state, way
        self.length, self.count = length, count

    def result(self) -> tuple[Measured, tuple[Message, ...], tuple[Product, ...]]:
        way = self.way
        block = copy.deepcopy(self.whole)
        cut(block, way.cutting)
        block.train()
        with torch.enable_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            _unreal(block)
            memory = Memory(self._answers(), self._watch)
            self.notes = notes = Notes(memory, way.gpu)
            with _named(block, notes):
                connect(block, way.cutting, notes)
                apply_recompute([block], way.recompute)
                with memory, operators(notes):
                    measured = self._measure(block, memory, notes)
        return measured, tuple(notes.messages), tuple(_merged(notes.products["forward"]))

    def _measure(self, block: Any, memory: Memory, notes: Notes) -> Measured:
        tokens = self.length * self.count
        parts = self.way.cutting.tp
        memory.ignore([*block.parameters(), *block.buffers()])
        for parameter in block.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(_put_aside, memory))
        with memory.paused():
            leaf = torch.empty((), requires_grad=True)
            sequence = TracedSequence(notes, tokens, self.count)
        x = _Begin.apply(leaf, (1, tokens // parts, self.width))
        router = _Begin.apply(leaf, (1, tokens // parts, self.state)) if self.state else None
        stream_in, state_in = memory.held(x), (0, 0) if router is None else memory.held(router)
        memory.begin()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.way.bf16):
            y, carry = block(x, sequence, None, Carry(router))
            forward, within = memory.peak, memory.live
            del x, router
            within = memory.live
        kept = memory.live
        out, after = y, carry.router_state
        stream_out, state_out = memory.held(out), (0, 0) if after is None else memory.held(after)
        shared_state = after is not None and state_out[0] == state_in[0]
        ends = [out] if after is None or shared_state or not after.requires_grad else [out, after]
        ends += [] if carry.auxiliary is None else [carry.auxiliary]
        end = _End.apply(*ends)
        del y, out, after, carry, ends

        def alive(held: tuple[int, int]) -> int:
            return held[1] if memory.alive(held[0]) else 0

        stream, own_stream, own_state = alive(stream_in), alive(stream_out), alive(state_out)
        state = 0 if shared_state else alive(state_in)
        outer = stream_out[1] + (0 if shared_state else state_out[1])
        inner = kept - outer - alive(stream_in) - (0 if shared_state else alive(state_in))
        memory.begin()
        notes.phase = "backward"
        torch.autograd.backward(end)
        first, second = (notes.products[phase] for phase in ("forward", "backward"))
        # The backward pass of a product of autograd's has two of the same work; those of the experts' operator are not seen here.
        # So have not those with matrices that are not trained, of layers that no rank has a part of.
        fixed = tokens // parts * sum(per_token(part, self.length).fixed for part in block.sublayers())
        again = sum(p.flops for p in second) - 2.0 * sum(p.flops for p in first if p.kept) + fixed
        return Measured(
            inner=max(0, inner), weights=within - kept, stream=stream, state=state, own_stream=own_stream,
            own_state=own_state, forward=forward, backward=memory.peak, fresh=memory.most,
            shared=sum(notes.shared.values()),
            products=sum(p.flops for p in first if self.way.recompute in (p.part, "none", "full", "selective")),
            again=max(0.0, again),
        )  # fmt: skip

    # -------------------------------------------------------------------------------------------- what has no shape

    def _answers(self) -> dict[Any, Any]:
        """Operators whose result depends on values."""

        def share() -> float:
            routing = self.notes.routing
            return 1.0 if routing is None else float(routing.share((self.length + 1) / 2))

        def nonzero(args: Any, kwargs: Any) -> Any:
            (mask,) = args
            if mask.dim() == 1:  # which of several lists have entries: all of them
                return mask.new_empty((mask.shape[0], 1), dtype=torch.int64)
            self.notes.rows = round(share() * mask.shape[-1])
            return mask.new_empty((self.notes.rows * mask.shape[0], mask.dim()), dtype=torch.int64)

        def index(args: Any, kwargs: Any) -> Any:
            x, indices = args
            mask = indices[0]
            if mask is None or mask.dtype != torch.bool:
                return NotImplemented
            return x.new_empty((self.notes.rows * mask.shape[-1], *x.shape[mask.dim() :]))

        def bincount(args: Any, kwargs: Any) -> Any:
            least = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
            return args[0].new_empty(least, dtype=torch.int64)

        def item(args: Any, kwargs: Any) -> Any:
            return self.notes.rows if not args[0].is_floating_point() else 0.0

        return {
            aten.nonzero.default: nonzero,
            aten.index.Tensor: index,
            aten.bincount.default: bincount,
            aten._local_scalar_dense.default: item,
        }

    def _watch(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        if func in (aten.mm.default, aten.addmm.default, aten.bmm.default):
            a, b = args[1:3] if func is aten.addmm.default else args[:2]
            count = a.shape[0] if func is aten.bmm.default else 1
            name = self.notes.names[-1] if self.notes.names else ""
            self.notes.multiply(name, a.shape[-2], b.shape[-1], a.shape[-1], count)


class _Begin(torch.autograd.Function):
    """A tensor from before, in fp32, in a graph."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, shape: tuple[int, ...]) -> Tensor:
        return leaf.new_empty(shape, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return None, None


def _unreal(block: nn.Module) -> None:
    """Gives a module on the meta device fake tensors in the place of its parameters and buffers."""
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _put_aside(memory: Memory, parameter: Tensor) -> None:
    """Frees a parameter's gradient when it is complete, as if it had been added to one that was there."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is not None:
        memory.aside += gradient.numel() * gradient.element_size()


@contextmanager
def _named(block: nn.Module, notes: Notes) -> Iterator[None]:
    """Within it, notes knows the module whose forward runs."""
    handles: list[Any] = []

    def enter(name: str, module: nn.Module, args: Any) -> None:
        notes.names.append(name)
        notes.routing = getattr(module, "routing", notes.routing)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        notes.names.pop()

    for name, module in block.named_modules():
        handles.append(module.register_forward_pre_hook(partial(enter, name)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _merged(products: list[Product]) -> Iterator[Product]:
    """Alike ones of one module as one."""
    counts: Counter[Product] = Counter()
    for product in products:
        counts[replace(product, count=0)] += product.count
    for product, count in counts.items():
        yield replace(product, count=count)
