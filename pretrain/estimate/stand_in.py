"""What a layer is given while it is traced: a sequence, experts, norms and tensor-parallel neighbours that compute nothing, keep
what the real ones keep, and take down the messages that the real ones would send.

Loads of experts are balanced: every expert gets as many tokens as any other, every rank as many as it sends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels import delta_rule, gated_linear_attention, short_convolution
from kernels.attention.chunked import attention as packed_attention
from kernels.cca.chunked import BLOCK_BYTES as CCA_BYTES
from kernels.experts.chunked import alignment
from kernels.experts.routing_chunked import route_chunked
from kernels.norm.chunked import BLOCK_ELEMENTS
from kernels.offline.choice import choosing
from kernels.rational.chunked import BLOCK_ELEMENTS as RATIONAL_ELEMENTS
from parallel.expert.apply import sparse_layers
from parallel.expert.travel import combined, copies
from parallel.tensor import units
from pretrain.estimate.kept import Like, chosen, recur, stand
from pretrain.estimate.memory import Memory
from pretrain.estimate.parameters import Cutting
from pretrain.model.sequence import SequenceContext

Phase = Literal["forward", "backward"]


@dataclass(frozen=True)
class Message:
    """A collective that a layer takes part in. bytes: S as in costs.Collective; over cp, what one rank brings of it.

    window: over cp, how many columns of each chunk travel; None: all of them, for which `bytes` is given. wide: bytes in fp32.
    """

    axis: str
    op: str
    what: str
    bytes: float
    phase: Phase
    hidden: bool = False
    window: int | None = None
    wide: float = 0.0


@dataclass(frozen=True)
class Product:
    """A matrix product of the forward pass: [rows, k] x [k, n], `count` of them; what: of which module; part: the layer's
    sublayer that makes it (mixer, ffn), or nothing.

    kept: selective recomputation keeps its result.
    """

    what: str
    rows: float
    n: int
    k: int
    count: int
    part: str
    kept: bool = True

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.n * self.k * self.count


@dataclass
class Notes:
    """What is taken down in the course of a layer's forward and backward pass."""

    memory: Memory
    gpu: bool
    phase: Phase = "forward"
    names: list[str] = field(default_factory=list)
    """Of the modules whose forward passes run."""
    routing: Any = None
    """Of the module that runs, where it routes different numbers of experts to its tokens."""
    products: dict[Phase, list[Product]] = field(default_factory=lambda: {"forward": [], "backward": []})
    messages: list[Message] = field(default_factory=list)
    shared: dict[tuple[int, float], int] = field(default_factory=dict)
    """Bytes of rotary tables, which all layers share."""
    rows: int = 0
    """Selected pairs of one expert, where a layer routes different numbers of experts to its tokens."""

    def multiply(self, what: str, rows: float, n: int, k: int, count: int, kept: bool = True) -> None:
        """Takes down a product of the module that runs."""
        part = next((name for name in self.names if name in ("mixer", "ffn")), "")
        self.products[self.phase].append(Product(what, rows, n, k, count, part, kept))

    def send(self, axis: str, op: str, what: str, nbytes: float, **more: Any) -> None:
        """Takes down a message."""
        self.messages.append(Message(axis, op, what, nbytes, self.phase, **more))


def size(x: Tensor) -> int:
    """Bytes."""
    return x.numel() * x.element_size()


class Borders:
    """Of `count` sequences of one length, for what reads them on the host."""

    def __init__(self, length: int, count: int):
        self.values = [length * i for i in range(count + 1)]

    def tolist(self) -> list[int]:
        return self.values


class TracedSequence(SequenceContext):
    """T tokens in `count` packed sequences."""

    def __init__(self, notes: Notes, tokens: int, count: int):
        with notes.memory.paused():
            positions = torch.empty(1, tokens, dtype=torch.int64)
            borders = torch.empty(count + 1, dtype=torch.int32)
        super().__init__(positions, borders)
        self.notes, self.count = notes, count

    def rotary(self, dim: int, theta: float) -> tuple[Tensor, Tensor]:
        with self.notes.memory.paused():
            tables = super().rotary(dim, theta)
        self.notes.shared[dim, theta] = sum(size(table) for table in tables)
        return tables

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        cache: Any = None,
    ) -> Tensor:
        reach = None if window is None else window - 1
        wide = 4.0 * (k.numel() + v.numel())
        self.notes.send("cp", "keys", "keys and values", size(k) + size(v), window=reach, wide=wide)
        return attend(self.notes, q, k, v, scale, window, self.count)

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = "silu", cache: Any = None
    ) -> Tensor:
        self._columns(x, weight.shape[1] - 1, "convolution's columns")
        return recur(short_convolution, (x, weight, bias), {"activation": activation}, self.count, self.notes.gpu)

    def recur(self, operator: Any, *inputs: Tensor | None, cache: Any = None, **options: Any) -> Tensor:
        self.notes.send("cp", "tails", "recurrence's states", 2.0 * summary(operator, inputs))
        return recur(operator, inputs, options, self.count, self.notes.gpu)

    def look_back(
        self, operator: Any, x: Tensor, *parameters: Tensor, reach: int, cache: Any = None, **options: Any
    ) -> tuple[Tensor, ...]:
        self._columns(x, reach, "convolutions' columns")
        return _queries_and_keys(self.notes, x, *parameters)

    def history(
        self, x: Tensor, reach: int, before: Tensor | None = None, cache: Any = None, name: str = "history"
    ) -> list[Tensor]:
        self._columns(x, reach, "earlier tokens")
        return super().history(x, reach, before, cache, name)

    def total(self, counts: Tensor) -> Tensor:
        self.notes.send("cp", "all_reduce", "loads of sequences", size(counts))
        return counts.clone()

    def _columns(self, x: Tensor, reach: int, what: str) -> None:
        if reach:
            self.notes.send("cp", "tails", what, 2.0 * reach * size(x) / x.shape[1])

    def part(self, ranks: int) -> TracedSequence:
        """For one of the ranks that share out its tokens between sublayers."""
        return _Part(self.notes, self.positions.shape[1] // ranks, self.count)


class _Part(TracedSequence):
    def owners(self) -> tuple[Tensor, int]:
        return torch.empty(self.positions.shape[1], dtype=torch.int64), self.count

    def total(self, counts: Tensor) -> Tensor:
        self.notes.send("tp", "all_reduce", "loads of sequences", size(counts))
        return super().total(counts)


def summary(operator: Any, inputs: Sequence[Tensor | None]) -> int:
    """Bytes by which one span of a recurrence is told to other ranks (parallel/context/recurrences.py): fp32."""
    span = [x if x is None or x.dim() < 3 else x[:, :1] for x in inputs]
    shapes = {name: x.shape for name, x in zip("qkvbgd", span) if x is not None}
    if operator is delta_rule:
        (K,), (HV, V) = shapes["k"][3:], shapes["v"][2:]
        return 4 * HV * K * (V + K)
    if operator is gated_linear_attention:
        (K,), (HV, V) = shapes["k"][3:], shapes["v"][2:]
        gate = span[3]
        return 4 * (HV * K * V + (0 if gate is None else gate.numel()))
    channels, states = shapes["v"]  # of A, the third input of the selective scan
    return 4 * channels * (states + 1)


def attend(
    notes: Notes, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, sequences: int
) -> Tensor:
    """Attention over packed sequences of one length."""
    B, T, H, _ = q.shape
    if not notes.gpu or q.dtype == torch.float32:
        options: Any = Borders(T // sequences, sequences)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        with torch.autocast("cpu", enabled=False):
            return packed_attention(
                q, k, v, scale=scale, causal=True, window=window, cu_seqlens=options, cu_seqlens_k=options
            )
    # The fused kernel for packed sequences keeps its inputs, its output, and the sums of the softmax in fp32.
    return stand(Like((B, T, H, v.shape[-1]), q.dtype), [q, k, v], [True] * 3, extra=4 * T * H, of_output=True)


class Experts:
    """Stands for kernels.experts and for the dispatchers of parallel/expert/dispatch.py."""

    def __init__(self, notes: Notes, experts: int, cutting: Cutting):
        self.notes, self.experts, self.cutting = notes, experts, cutting

    def __call__(
        self, tokens: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, scores: Tensor, activation: str = "silu"
    ) -> Tensor:
        if self.cutting.ep == 1:
            return self._gathered(tokens, gate_up, down, indices, scores)
        notes, k = self.notes, indices.shape[1]
        order = torch.argsort(indices.reshape(-1), stable=True)
        position = torch.empty_like(order).view_as(indices)
        notes.send("ep", "all_to_all", "loads of experts", 8.0 * self.experts)
        rows = copies(tokens, order, position)
        weights = scores.reshape(-1).index_select(0, order)
        rows, weights = _Travel.apply(notes, "ep", rows, weights)
        expert = torch.empty(rows.shape[0], 1, dtype=torch.int64)
        out = self._gathered(rows, gate_up, down, expert, weights[:, None])
        assert k >= 1
        return combined(_Return.apply(notes, out), order, position)

    def _gathered(self, tokens: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, scores: Tensor) -> Tensor:
        tp = self.cutting.tp if self.cutting.expert_tensor else 1
        if tp == 1:
            return self._local(tokens, gate_up, down, indices, scores)
        notes = self.notes
        notes.send("tp", "all_gather", "numbers of tokens", 8.0 * tp)
        notes.send("tp", "all_gather", "choices of experts", 8.0 * tp * indices.numel())
        chosen = torch.empty(tp * indices.shape[0], indices.shape[1], dtype=torch.int64)
        every, weights = _Join.apply(notes, tp, tokens, scores)
        out = self._local(every, gate_up, down, chosen, weights)
        return _Share.apply(notes, tp, out, "experts' tokens")

    def _local(self, tokens: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, scores: Tensor) -> Tensor:
        E, F, D = down.shape
        choices, rows = indices.numel(), alignment(tokens) if not self.notes.gpu else 1
        held = -(-choices // E // rows) * rows * E if choices else 0
        held = max(held, choices)
        W = gate_up.shape[2]  # 2 F with gates
        self.notes.multiply("experts.gate_up", choices / E, W, D, E, kept=False)
        self.notes.multiply("experts.down", choices / E, D, F, E, kept=False)
        item = tokens.element_size()
        cast = 0 if gate_up.dtype == tokens.dtype else (W + F) * D * item
        if self.notes.gpu:  # hidden activations of all rows; all matrices in the tokens' precision
            extra = held * W * item + 4 * choices
            scratch = (held * F * item + E * cast, held * (W + F) * item + E * cast)
        else:  # kept are the projections, and who is where; one expert at a time passes through the other buffers
            extra = held * W * item + 8 * (2 * held + choices)
            # Loads are not even: the largest is taken for half as much again.
            share = min(held, 3 * held // (2 * E)) * item
            scratch = (share * (D + F) + cast, share * (D + W + 2 * F) + cast)
        y: Tensor = _Experts.apply(tokens, gate_up, down, scores, extra, held, scratch)
        return y


class _Experts(torch.autograd.Function):
    """kernels/experts in its allocations."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        scores: Tensor,
        extra: int,
        rows: int,
        scratch: tuple[int, int],
    ) -> Tensor:
        hidden = x.new_empty(extra, dtype=torch.uint8)
        out = x.new_empty(rows, x.shape[1])
        ctx.save_for_backward(x, gate_up, down, scores, hidden)
        ctx.rows, ctx.scratch = rows, scratch[1]
        x.new_empty(scratch[0], dtype=torch.uint8)
        y = torch.empty_like(x)
        del out
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, gate_up, down, scores, _ = ctx.saved_tensors
        rows = x.new_empty(ctx.rows, x.shape[1])
        gradients = torch.empty_like(gate_up), torch.empty_like(down)
        scratch = x.new_empty(ctx.scratch, dtype=torch.uint8)
        dx = torch.empty_like(x)
        del rows, scratch
        return dx, *gradients, torch.empty_like(scores), None, None, None


class _Travel(torch.autograd.Function):
    """Rows and weights to the ranks that hold their experts, as many as come from there."""

    @staticmethod
    def forward(ctx: Any, notes: Notes, axis: str, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.notes, ctx.like = notes, (rows.shape, weights.shape)
        notes.send("ep", "all_to_all", "experts' tokens", size(rows), hidden=True)
        notes.send("ep", "all_to_all", "weights", size(weights), hidden=True)
        return torch.empty_like(rows), torch.empty_like(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: Tensor, dweights: Tensor) -> Any:
        ctx.notes.send("ep", "all_to_all", "gradients of experts' tokens", size(drows), hidden=True)
        ctx.notes.send("ep", "all_to_all", "gradients of weights", size(dweights), hidden=True)
        return None, None, torch.empty_like(drows), torch.empty_like(dweights)


class _Return(torch.autograd.Function):
    """Results home; the gradients go there."""

    @staticmethod
    def forward(ctx: Any, notes: Notes, rows: Tensor) -> Tensor:
        ctx.notes = notes
        notes.send("ep", "all_to_all", "experts' results", size(rows))
        return torch.empty_like(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        ctx.notes.send("ep", "all_to_all", "gradients of experts' results", size(dy))
        return None, torch.empty_like(dy)


class _Join(torch.autograd.Function):
    """Tokens and weights of all tp ranks, for experts that are cut over tp."""

    @staticmethod
    def forward(ctx: Any, notes: Notes, ranks: int, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.notes, ctx.ranks = notes, ranks
        notes.send("tp", "all_gather", "experts' tokens", ranks * size(tokens), hidden=True)
        notes.send("tp", "all_gather", "weights", ranks * size(weights), hidden=True)
        many = (ranks * tokens.shape[0], *tokens.shape[1:]), (ranks * weights.shape[0], *weights.shape[1:])
        return tokens.new_empty(many[0]), weights.new_empty(many[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtokens: Tensor, dweights: Tensor) -> Any:
        ctx.notes.send("tp", "reduce_scatter", "gradients of experts' tokens", size(dtokens), hidden=True)
        ctx.notes.send("tp", "reduce_scatter", "gradients of weights", size(dweights), hidden=True)
        rows = dtokens.shape[0] // ctx.ranks
        return None, None, dtokens.new_empty(rows, *dtokens.shape[1:]), dweights.new_empty(rows, *dweights.shape[1:])


class _Share(torch.autograd.Function):
    """x [ranks * n, ...] of parts -> this rank's n rows of the sum. In `Tokens` form [B, T, D], along T."""

    @staticmethod
    def forward(ctx: Any, notes: Notes, ranks: int, x: Tensor, what: str) -> Tensor:
        ctx.notes, ctx.ranks, ctx.what, ctx.dim = notes, ranks, what, 1 if x.dim() == 3 else 0
        notes.send("tp", "reduce_scatter", what, size(x))
        shape = list(x.shape)
        shape[ctx.dim] //= ranks
        return x.new_empty(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        ctx.notes.send("tp", "all_gather", f"gradients of {ctx.what}", ctx.ranks * size(dy))
        shape = list(dy.shape)
        shape[ctx.dim] *= ctx.ranks
        return None, None, dy.new_empty(shape), None


class _Gather(torch.autograd.Function):
    """x [B, T / ranks, D] -> [B, T, D]."""

    @staticmethod
    def forward(ctx: Any, notes: Notes, ranks: int, x: Tensor) -> Tensor:
        ctx.notes, ctx.ranks = notes, ranks
        notes.send("tp", "all_gather", "tokens", ranks * size(x))
        return x.new_empty(x.shape[0], ranks * x.shape[1], *x.shape[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        ctx.notes.send("tp", "reduce_scatter", "gradients of tokens", size(dy))
        return None, None, dy.new_empty(dy.shape[0], dy.shape[1] // ctx.ranks, *dy.shape[2:])


class _Across(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, notes: Notes, x: Tensor) -> Tensor:
        ctx.notes = notes
        notes.send("tp", "all_reduce", "sums within a unit", size(x))
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        ctx.notes.send("tp", "all_reduce", "gradients of sums within a unit", size(dy))
        return None, torch.empty_like(dy)


def cut(block: nn.Module, cutting: Cutting) -> None:
    """A block on the meta device -> the first tensor-parallel rank's part of it, with the first ranks' experts."""
    tp = cutting.tp
    if tp > 1:
        for name, unit in list(units(block)):
            owner, _, own = name.rpartition(".")
            setattr(block.get_submodule(owner), own, unit.part(0, tp))
    sizes = {"ep": cutting.ep, "tp": tp if cutting.expert_tensor else 1}
    for _, layer in sparse_layers(block):
        if not any(n > 1 for n in sizes.values()) or (tp > 1 and not layer.routes_by_token):
            continue
        for name, splits in layer.expert_splits().items():
            part = getattr(layer, name).detach()
            for split in splits:
                part = split.take(part, 0, sizes[split.axis])
            setattr(layer, name, nn.Parameter(part))


def connect(block: nn.Module, cutting: Cutting, notes: Notes) -> None:
    """Gives a cut block's layers what stands for their neighbours. Before recomputation is applied, as in a run."""
    ranks = cutting.tp
    for _, layer in sparse_layers(block):
        local = ranks > 1 and not layer.routes_by_token
        layer.dispatch = Experts(notes, layer.experts, Cutting() if local else cutting)
    for module in block.modules():
        held: Any = module
        if hasattr(module, "reduce_load"):
            held.reduce_load = partial(_reduce_load, notes)
        if ranks > 1 and getattr(module, "contextual", False) and not _is_unit(module):
            module.register_forward_pre_hook(partial(_part_of_sequence, ranks))
    if ranks > 1:
        for _, unit in list(units(block)):
            unit.across = partial(_across, notes)
            unit.register_forward_pre_hook(partial(_gather_tokens, notes, ranks))
            unit.register_forward_hook(partial(_scatter_sum, notes, ranks))


def _is_unit(module: Any) -> bool:
    return any(split.axis == "tp" for split in module.splits().values())


def _reduce_load(notes: Notes, counts: Tensor) -> Tensor:
    notes.send("dp_cp_tp", "all_reduce", "loads of experts", size(counts))
    return counts.clone()


def _across(notes: Notes, x: Tensor) -> Tensor:
    y: Tensor = _Across.apply(notes, x)
    return y


def _part_of_sequence(ranks: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, sequence, *others = args
    return (x, sequence.part(ranks), *others)


def _gather_tokens(notes: Notes, ranks: int, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *others = args
    if torch.is_autocast_enabled("cpu") and not module.reads_wide:
        x = x.to(torch.get_autocast_dtype("cpu"))
    return (_Gather.apply(notes, ranks, x), *others)


def _scatter_sum(notes: Notes, ranks: int, module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (_Share.apply(notes, ranks, output[0], "results"), *output[1:])
    return _Share.apply(notes, ranks, output, "results")


# ---------------------------------------------------------------------------------- operators that are called by themselves


def _norm(notes: Notes, x: Tensor, *others: Any, **options: Any) -> Tensor:
    tensors = [x, *(other for other in others if isinstance(other, Tensor))]
    rows = x.numel() // x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32).itemsize
    # On a CPU row blocks of a fixed size are widened (kernels/norm/chunked.py); a GPU's kernel keeps them in registers.
    block = 0 if notes.gpu else wide * min(x.numel(), BLOCK_ELEMENTS * torch.get_num_threads())
    scratch = (
        block * (1 + (x.dtype != torch.float32)),
        block * (2 + 2 * (x.dtype != torch.float32) + len(others) // 3),
    )
    return stand(Like(tuple(x.shape), x.dtype), tensors, [True] * len(tensors), rows * wide, scratch)


def _rational(notes: Notes, x: Tensor, *coefficients: Tensor) -> Tensor:
    """kernels/rational in its allocations."""
    scratch = (0, 0)  # on a GPU a few sums of each program
    if not notes.gpu:  # temporaries of a row block, one more for rows that are widened
        D, wide = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
        rows = min(x.numel() // D, max(1, RATIONAL_ELEMENTS * torch.get_num_threads() // D))
        each, widened = rows * D * wide.itemsize, x.dtype != wide
        scratch = ((2 + widened) * each, (5 + widened) * each)
    return stand(Like(tuple(x.shape), x.dtype), [x, *coefficients], [True] * (1 + len(coefficients)), scratch=scratch)


def _add_norm(notes: Notes, x: Tensor, residual: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _norm(notes, total, *others), total


def _rotary(x: Tensor, *angles: Any) -> Tensor:
    return stand(Like(tuple(x.shape), x.dtype), [x], [False])  # the angles, which all layers share, are counted once


def _swiglu(gate_up: Tensor) -> Tensor:
    *rows, width = gate_up.shape
    return stand(Like((*rows, width // 2), gate_up.dtype), [gate_up], [True])


def _queries_and_keys(notes: Notes, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    """kernels/cca in its allocations."""
    depthwise, _, grouped, _, factor = parameters
    B, T, C = z.shape
    J, rows, d = grouped.shape
    HKV, W1, item = factor.numel(), rows // d, z.element_size()
    # Gradients are off inside the operator, whose backward makes the convolutions again.
    notes.multiply("cca.grouped", B * T, d, rows, J, kept=False)
    if notes.gpu:
        # Both convolutions as one; the gradients of what is normalised, and sums of each program.
        taps = 4 * J * d * d * (depthwise.shape[1] + W1 - 1)
        scratch = (2 * taps, size(z) + 5 * taps)
    else:
        block = min(B * T * C, CCA_BYTES * torch.get_num_threads() // 4)  # worked through in blocks of so many elements
        wide = torch.promote_types(z.dtype, torch.float32).itemsize
        low = item + wide if item != wide else 0  # products, and rows in fp32
        forward = block * (wide + W1 * item + low)
        scratch = (forward, forward + block * wide * (3 + (W1 if item == wide else 1)) + grouped.numel() * wide)
    q = stand(Like((B, T, J - HKV, d), z.dtype), (z, *parameters), [True] * 6, scratch=scratch)
    # Its gradient reaches z by the queries': there is one for both.
    return q, stand(Like((B, T, HKV, d), z.dtype), [factor], [True])


class _Form:
    def __init__(self, function: Callable[..., Tensor]):
        self.function = function

    def load(self) -> Callable[..., Tensor]:
        return self.function


@contextmanager
def operators(notes: Notes) -> Iterator[None]:
    """Within it, the operators that layers call by themselves compute nothing."""
    import pretrain.model.mixers.selective_attention as selective

    norm = partial(_norm, notes)
    forms: dict[str, Any] = {
        **dict.fromkeys(("rms_norm", "l2_norm", "gated_rms_norm"), norm),
        "add_rms_norm": partial(_add_norm, notes),
        "experts_routing": route_chunked,
        "rational": partial(_rational, notes),
        "rotary": _rotary,
        "swiglu": _swiglu,
    }

    def choice(real: Any, request: Any) -> Any:
        measured = chosen(real, request)
        if measured is not None:
            return measured
        if request.op not in forms:
            raise ValueError(f"the memory of {request.op} is not known where a layer calls it by itself")
        return _Form(forms[request.op])

    def selected(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, **_: Any) -> Tensor:
        return attend(notes, q, k, v, None, None, cu_seqlens.numel() - 1)

    real = selective.attention
    selective.attention = selected  # type: ignore[assignment]
    try:
        with choosing(choice):
            yield
    finally:
        selective.attention = real
