"""One pipeline rank of a job: which layers and which ends of the model it has, and what these cost it in a step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from kernels.cross_entropy.chunked import default_chunk
from parallel.grid import Grid
from pretrain.config import RunConfig
from pretrain.estimate import engines
from pretrain.estimate.costs import Collective, Matmul, StageCosts
from pretrain.estimate.model import Kind, ModelCosts, Way
from pretrain.estimate.parameters import BYTES, Cutting, Part
from pretrain.estimate.stand_in import Message
from pretrain.estimate.trace import Measured, Traced

FINAL = ("norm.", "head.", "multi_token.")


@dataclass(frozen=True)
class Setting:
    """What all ranks of a job have in common. tokens: of a micro-batch that one rank's mixers see."""

    model: ModelCosts
    config: RunConfig
    grid: Grid
    way: Way
    tokens: int
    micro_batches: int
    context: float
    ranks_per_node: int

    @cached_property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.config.data.sequence_length

    def traced(self, kind: Kind) -> Traced:
        return kind.traced(self.model.width, self.length, self.way)

    @cached_property
    def low(self) -> int:
        """Bytes of an element of the matrix products."""
        return 2 if self.way.bf16 else 4

    def extent(self, axis: str) -> tuple[int, int]:
        """(ranks, how many of them share a node) of a group. axis: of the grid, or world."""
        size, stride = (self.grid.world, 1) if axis == "world" else self.grid.extent(axis)
        return size, max(1, min(size, self.ranks_per_node // stride))


@dataclass(frozen=True)
class Held:
    """The layers of one stage. number: of the stage, of `stages`. at: the number of its first layer."""

    kinds: tuple[Kind, ...]
    number: int
    stages: int
    at: int

    @property
    def first(self) -> bool:
        return self.number == 0

    @property
    def last(self) -> bool:
        return self.number == self.stages - 1

    @cached_property
    def counts(self) -> Counter[Kind]:
        return Counter(self.kinds)


def ends(setting: Setting, held: Held) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The parameters (before, after) the layers of a stage."""
    model, cutting = setting.model, setting.way.cutting
    before = tuple(p.held(cutting) for p in model.ends if not p.name.startswith(FINAL)) if held.first else ()
    after: tuple[Part, ...] = ()
    if held.last:
        after = tuple(p.held(cutting) for p in model.ends if p.name.startswith(FINAL))
        after += model.extra.parts(cutting) if model.extra is not None else ()
        if not held.first and doubled(model):
            after = (next(p.held(cutting) for p in model.ends if p.name == "embedding.weight"), *after)
    return before, after


def doubled(model: ModelCosts) -> bool:
    """Whether the last stage of a pipeline has a copy of the embedding."""
    return model.model.head is None or model.extra is not None


# ------------------------------------------------------------------------------------------------------------------- work


def flops(setting: Setting, held: Held) -> tuple[float, float]:
    """(useful FLOPs of a rank's step in this stage, forward and backward; those of recomputation)."""
    model, context = setting.model, setting.context
    share = setting.tokens * setting.micro_batches / setting.grid.tp
    forward = sum(kind.flops(context) * count for kind, count in held.counts.items())
    again = 0.0
    if setting.way.recompute != "none":
        for kind, count in held.counts.items():
            measured = setting.traced(kind).measured(setting.tokens)
            other = (
                kind.flops(context) * setting.tokens / setting.grid.tp - measured.products
            )  # recurrences and attention
            if setting.way.recompute == "selective" and not setting.way.gpu:  # there attention's result is kept, too
                other -= (kind.flops(context) - kind.flops(0.0)) * setting.tokens / setting.grid.tp
            again += (measured.again + max(0.0, other)) * setting.micro_batches * count
    head = model.head_flops(context) if held.last else 0.0
    return 3.0 * share * (forward + head), again


def matmuls(setting: Setting, held: Held) -> Iterator[Matmul]:
    for kind, count in held.counts.items():
        for product in setting.traced(kind).products(setting.tokens):
            calls = product.count * count * setting.micro_batches
            yield Matmul(f"{kind.label}: {product.what}", product.rows, product.n, product.k, calls)
    if held.last:
        times = 2 if setting.model.extra is not None else 1
        rows = setting.model.vocabulary // setting.grid.tp
        yield Matmul("head", setting.tokens, rows, setting.model.width, times * setting.micro_batches)


# --------------------------------------------------------------------------------------------------------------- messages


def collectives(
    setting: Setting, held: Held, groups: Sequence[engines.Group], order: Sequence[Part]
) -> Iterator[Collective]:
    """All messages of a rank's step in this stage."""

    def made(send: engines.Send) -> Iterator[Collective]:
        ranks, near = setting.extent(send.axis)
        if ranks > 1 and send.calls and send.bytes:
            yield Collective(send.axis, send.op, send.what, send.bytes, send.calls, ranks, near, send.hidden)

    for send in engines.sends(setting.config, setting.grid, groups, order, setting.micro_batches):
        yield from made(send)
    for kind, count in held.counts.items():
        for send in of_layer(setting, kind):
            yield from made(send._replace(calls=send.calls * count * setting.micro_batches))
    for send in (*of_ends(setting, held), *of_borders(setting, held)):
        yield from made(send)


def of_layer(setting: Setting, kind: Kind) -> list[engines.Send]:
    """A layer's own messages for one micro-batch."""
    grid = setting.grid
    if max(grid.tp, grid.ep, grid.cp, grid.stage) == 1:
        return []
    counts: Counter[engines.Send] = Counter()
    for message in setting.traced(kind).messages(setting.tokens):
        for send in _sends(setting, message):
            counts[send._replace(calls=0)] += send.calls
    return [send._replace(calls=calls) for send, calls in counts.items()]


def _sends(setting: Setting, message: Message) -> Iterator[engines.Send]:
    Send, cp = engines.Send, setting.grid.cp
    if message.op == "keys":
        chunk = setting.tokens // 2
        reach = chunk if message.window is None else min(chunk, message.window)
        if reach == chunk and setting.config.mesh.context == "ring":
            yield Send("cp", "send_recv", "keys and values", message.bytes, cp - 1, True)
            if message.phase == "forward":
                yield Send("cp", "send_recv", "keys and values", message.bytes, cp - 1, True)
                yield Send("cp", "send_recv", "gradients of keys and values", message.wide, cp, False)
            return
        message = replace(message, op="tails", bytes=message.bytes * reach / chunk if chunk else 0.0)
    if message.op == "tails":
        yield Send("cp", "all_gather", message.what, message.bytes * cp, 1, False)
        if message.phase == "forward":  # each has one backward pass, that of its last computation
            yield Send("cp", "reduce_scatter", f"gradients of {message.what}", message.bytes * cp, 1, False)
        return
    yield Send(message.axis, message.op, message.what, message.bytes, 1, message.hidden)


def of_ends(setting: Setting, held: Held) -> Iterator[engines.Send]:
    """Those of embedding, loss and multi-token layer, and of the step as a whole."""
    Send, model, grid, times = engines.Send, setting.model, setting.grid, setting.micro_batches
    rows, D = setting.tokens, model.width
    looks = int(held.first) + int(held.last and model.extra is not None)
    if grid.tp > 1 and looks:
        yield Send("tp", "reduce_scatter", "embeddings", 4.0 * rows * D, looks * times, False)
        yield Send("tp", "all_gather", "gradients of embeddings", 4.0 * rows * D, looks * times, False)
    if held.last:
        losses = 2 if model.extra is not None else 1
        if grid.tp > 1:
            step = max(1, default_chunk(rows, model.vocabulary // grid.tp) // grid.tp)
            chunks = math.ceil(rows // grid.tp / step)
            calls, part = chunks * losses * times, rows / chunks
            yield Send("tp", "all_gather", "loss: tokens", setting.low * part * D, calls, False)
            yield Send("tp", "all_reduce", "loss: largest logits", 4.0 * part, calls, False)
            yield Send("tp", "all_reduce", "loss: sums of exponentials", 12.0 * part, calls, False)
            yield Send("tp", "reduce_scatter", "loss: gradients of tokens", setting.low * part * D, calls, False)
        if model.extra is not None:
            yield Send("cp", "all_gather", "following tokens", 16.0 * grid.cp, 2 * times, False)
            for send in of_layer(setting, model.extra):
                yield send._replace(calls=send.calls * times)
    if held.number < grid.pp:  # once a rank
        yield Send("world", "all_reduce", "counts of targets", 8.0, 1, False)
        yield Send("world", "all_reduce", "loss", 16.0, 1, False)
        if setting.config.engine.kind == "torch":
            yield Send("world", "all_reduce", "gradient norm", 8.0, 1, False)
    loads = sum(kind.loads * count for kind, count in held.counts.items())
    loads += model.extra.loads if held.last and model.extra is not None else 0
    if loads:
        yield Send("dp_cp_tp", "all_reduce", "loads of routers", 8.0 * loads, 1, False)


def of_borders(setting: Setting, held: Held) -> Iterator[engines.Send]:
    """What a stage of a pipeline sends to its neighbours."""
    if setting.grid.pp == 1:
        return
    Send, model = engines.Send, setting.model
    plan = model.plan(setting.config, setting.grid)

    def neighbours(number: int, other: int) -> bool:
        return plan.holder(number) != plan.holder(other)

    if not held.last and neighbours(held.number, held.number + 1):
        for what, size in border(setting, held.at + len(held.kinds)):
            yield Send("pp", "send_recv", what, size, setting.micro_batches, False)
    if not held.first and neighbours(held.number, held.number - 1):
        for what, size in border(setting, held.at):
            yield Send("pp", "send_recv", f"gradients of {what}", size, setting.micro_batches, False)
    if (held.first or held.last) and doubled(model) and plan.holder(0) != plan.holder(plan.stages - 1):
        part = next(p.held(setting.way.cutting) for p in model.ends if p.name == "embedding.weight")
        yield Send(
            "pp", "send_recv", "embedding's gradient", BYTES * part.shard(setting.grid.size("shard_cp")), 1, False
        )


def border(setting: Setting, edge: int) -> list[tuple[str, float]]:
    """(what, bytes) of each tensor that goes from layer edge - 1 to layer edge."""
    model = setting.model
    a_channel = 4.0 * setting.tokens / setting.grid.tp
    tensors = [("residual stream", a_channel * model.width)]
    before, after = model.layers[:edge], [*model.layers[edge:], *([] if model.extra is None else [model.extra])]
    routed = max((getattr(kind.block.ffn, "router_width", 0) for kind in before), default=0)
    if routed and any(getattr(kind.block.ffn, "router_width", 0) for kind in after):
        tensors.append(("router state", a_channel * routed))
    if any(kind.contextual for kind in before):
        tensors.append(("auxiliary loss", 4.0))
    return tensors


# ----------------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Activations:
    """Bytes for one micro-batch in one stage. kept: from its forward to its backward pass. forward, backward: the most at a time,
    with the part of the gradients that is there in a step's only backward pass where `growing`."""

    kept: float
    forward: float
    backward: float


def activations(setting: Setting, held: Held, growing: float) -> Activations:
    """growing: bytes of gradients for each parameter element that the backward pass brings one layer after another; 0 if they are
    there already, or never whole."""
    model, tokens = setting.model, setting.tokens
    of_kind = {kind: setting.traced(kind).measured(tokens) for kind in held.counts}
    measured = [of_kind[kind] for kind in held.kinds]
    elements = {kind: sum(part.elements for part in kind.parts(setting.way.cutting)) for kind in of_kind}
    stream = 4.0 * tokens / setting.grid.tp * model.width
    own = _around_layers(setting, held)
    kept, casts, forward = own.before, 0.0, own.before
    kept += max((m.shared for m in measured), default=0.0)
    starts: list[float] = []
    previous: Measured | None = None
    for m in measured:
        # What one layer hands on and the next one takes in is one tensor, whoever keeps it.
        starts.append(kept)
        forward = max(forward, kept + casts + m.forward)
        handed = (0.0, 0.0) if previous is None else (previous.own_stream, previous.own_state)
        kept += m.inner + max(m.stream, handed[0]) + max(m.state, handed[1])
        casts += m.weights
        previous = m
    if previous is not None:
        kept += previous.own_state if held.last else 0.0
    if held.last:
        forward = max(forward, kept + casts + own.loss)
        kept += own.after
        grown = own.head_gradient if growing else 0.0
        backward = kept + own.loss_backward
    else:
        kept += stream  # what was sent stays for the backward pass
        grown, backward = 0.0, kept + stream
    for start, m, kind in zip(reversed(starts), reversed(measured), reversed(held.kinds)):
        backward = max(backward, start + m.backward + grown)
        grown += growing * elements[kind]
    backward = max(backward, own.before + own.embedding_backward + grown)
    return Activations(kept, forward, backward)


@dataclass(frozen=True)
class Around:
    """Bytes of what is around the layers. before: kept by the embedding. after: kept by norm and loss. loss, loss_backward: the
    most at a time in its forward and its backward pass, besides what layers keep; embedding_backward: in that pass.
    head_gradient: of the head's weights."""

    before: float
    after: float
    loss: float
    loss_backward: float
    embedding_backward: float
    head_gradient: float


def _around_layers(setting: Setting, held: Held) -> Around:
    model, tp = setting.model, setting.grid.tp
    T, D, V, low = setting.tokens, model.width, model.vocabulary // tp, setting.low
    own = T / tp
    table = 4.0 * V * D
    before = 0.0
    if held.first:
        before += 8.0 * T + (T if tp > 1 else 0.0) * 2
        if model.model.config.block.residual_scaling:
            before += 4.0 * own * D
    if not held.last:
        return Around(before, 0.0, 0.0, 0.0, table + 4.0 * own * D, 0.0)
    losses = 2 if model.extra is not None else 1
    stream, normed = 4.0 * own * D, low * own * D
    after = stream + 4.0 * own + losses * (normed + table)
    chunk = min(default_chunk(T, V), T)
    if tp > 1:
        scratch = chunk * V * (4.0 + low) + low * chunk * D * 2 + low * V * D
    else:
        scratch = chunk * V * low + low * V * D
        if low != 4:
            scratch += 4.0 * chunk * V if setting.way.gpu else 2.0**20
    weight = low * V * D if low != 4 else 0.0
    extra = 0.0
    if model.extra is not None:
        measured = model.extra.traced(model.width, setting.length, replace(setting.way, recompute="none")).measured(T)
        extra = measured.inner + measured.stream + measured.state + 2 * stream + low * own * 2 * D
        after += extra
    loss = after + normed + weight + scratch
    loss_backward = table + normed + (stream if low != 4 else 0.0)
    return Around(before, after, loss, loss_backward, table + 4.0 * own * D, table)


def costs(setting: Setting, stages: Sequence[Held], flight: Sequence[int]) -> StageCosts:
    """Of a pipeline rank that holds these stages, with so many micro-batches of each under way."""
    cutting = setting.way.cutting
    groups: list[engines.Group] = []
    order: list[Part] = []
    for held in stages:
        before, after = ends(setting, held)
        if before or after:
            groups.append(engines.Group("around the layers", before + after, 1, True))
        groups += [engines.Group(kind.label, kind.parts(cutting), count, False) for kind, count in held.counts.items()]
        order += [*before, *(part for kind in held.kinds for part in kind.parts(cutting)), *after]
    state = engines.state(setting.config, setting.grid, groups, setting.micro_batches)
    sharded = setting.grid.size("shard_cp") > 1 or setting.config.engine.kind == "deepspeed"
    growing = float(BYTES) if state.growing and not sharded else 0.0
    each = [activations(setting, held, growing) for held in stages]
    held_back = sum(a.kept * max(0, n - 1) for a, n in zip(each, flight))
    others = sum(a.kept for a, n in zip(each, flight) if n > 0)
    moment = max(max(a.forward, a.backward) + others - a.kept for a in each) + held_back
    # Gathered: the layer at work, and the flat buffer of the next one; in the backward pass its gradients besides, twice.
    buffers = state.gathered + (4.0 if state.gradients else 2.0) * state.unit
    gradients = 0.0 if growing else state.gradients
    steady = state.weights + state.optimizer
    peak = steady + max(gradients + moment + buffers, state.gradients + state.scratch)
    work = [flops(setting, held) for held in stages]
    messages = tuple(c for held in stages for c in collectives_of(setting, held, groups, order, held is stages[0]))
    return StageCosts(
        layers=tuple(held.at + i for held in stages for i in range(len(held.kinds))),
        parameters=state.elements,
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        activations=moment,
        buffers=buffers,
        peak=peak,
        flops=sum(useful for useful, _ in work),
        recomputed=sum(again for _, again in work),
        matmuls=tuple(m for held in stages for m in matmuls(setting, held)),
        collectives=messages,
    )


def collectives_of(
    setting: Setting, held: Held, groups: Sequence[engines.Group], order: Sequence[Part], first: bool
) -> Iterator[Collective]:
    """As `collectives`, with the engine's own in the first stage of a rank only."""
    yield from collectives(setting, held, groups if first else (), order if first else ())


def cutting_of(grid: Grid) -> Cutting:
    return Cutting.of(grid)
