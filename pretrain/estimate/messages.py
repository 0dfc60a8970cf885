"""What one pipeline stage of a job sends in a step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from kernels.cross_entropy.chunked import default_chunk
from pretrain.estimate import engines
from pretrain.estimate.costs import Collective
from pretrain.estimate.model import Kind
from pretrain.estimate.parameters import BYTES, Weighed
from pretrain.estimate.setting import Held, Setting, around, doubled
from pretrain.estimate.stand_in import Message
from pretrain.optim.lamb import LAMBConfig
from pretrain.optim.muon import MuonConfig


def collectives(
    setting: Setting, stages: Sequence[Held], groups: Sequence[engines.Group], order: Sequence[Weighed]
) -> Iterator[Collective]:
    """All messages of a rank's step."""

    def made(send: engines.Send) -> Iterator[Collective]:
        ranks, near = setting.extent(send.axis)
        if ranks > 1 and send.calls and send.bytes:
            yield Collective(send.axis, send.op, send.what, send.bytes, send.calls, ranks, near, send.hidden)

    for send in engines.sends(setting.config, setting.grid, groups, order, setting.micro_batches):
        yield from made(send)
    for held in stages:
        for kind, count in held.counts.items():
            for send in of_layer(setting, kind):
                yield from made(send._replace(calls=send.calls * count * setting.micro_batches))
        for send in (*of_ends(setting, held), *of_borders(setting, held)):
            yield from made(send)
    for send in (*of_step(setting, stages), *of_update(setting, stages, groups)):
        yield from made(send)


def of_step(setting: Setting, stages: Sequence[Held]) -> Iterator[engines.Send]:
    """Once a step and rank."""
    yield engines.Send("world", "all_reduce", "counts of targets", 8.0, 1, False)
    yield engines.Send("world", "all_reduce", "loss", 16.0, 1, False)
    if setting.config.engine.kind == "torch":
        yield engines.Send("world", "all_reduce", "gradient norm", 8.0, 1, False)
    loads = sum(kind.loads * count for held in stages for kind, count in held.counts.items())
    extra = setting.model.extra
    loads += extra.loads if stages[-1].last and extra is not None else 0
    yield engines.Send("dp_cp_tp", "all_reduce", "loads of routers", 8.0 * loads, 1, False)


def of_update(setting: Setting, stages: Sequence[Held], groups: Sequence[engines.Group]) -> Iterator[engines.Send]:
    """The optimizer's own: pretrain/optim/exchange.py and lamb.py."""
    optimizer, layers = setting.model.optimizer, [kind for held in stages for kind in held.kinds]
    last, ranks = any(held.last for held in stages), setting.grid.size("dp_cp_tp")
    if isinstance(optimizer, MuonConfig):
        low = 2 if optimizer.precision == "bf16" else 4
        whole = sum(m * n * count for (m, n), count in setting.model.matrices(layers, last).items()) / ranks
        held = sum(group.weighed.orthogonalised * group.count for group in groups)
        rounds = max(1, math.ceil(low * whole / optimizer.bucket_bytes))
        # One rank sends each block to the matrix's owner, who sends results to all ranks that hold one.
        yield engines.Send("dp_cp_tp", "all_to_all", "matrices for the update", low * whole / rounds, rounds, True)
        yield engines.Send("dp_cp_tp", "all_to_all", "updates of matrices", low * held / rounds, rounds, True)
    if isinstance(optimizer, LAMBConfig):
        parts = [parameter for kind in layers for parameter in kind.parameters]
        parts += [parameter for held in stages for side in around(setting.model, held) for parameter in side]
        norms = sum(
            p.shape[0] if len(p.shape) > 2 else 1 for p in parts if p.decays or p.name.endswith("embedding.weight")
        )
        yield engines.Send("dp_cp_tp", "all_gather", "norms of layers", 16.0 * norms * ranks, 1, False)


def of_layer(setting: Setting, kind: Kind) -> list[engines.Send]:
    """A layer's own messages for one micro-batch."""
    return setting.once(("sends", kind), lambda: list(_of_layer(setting, kind)))


def _of_layer(setting: Setting, kind: Kind) -> Iterator[engines.Send]:
    counts: Counter[engines.Send] = Counter()
    for message in setting.traced(kind).messages(setting.tokens):
        for send in _sends(setting, message):
            if setting.extent(send.axis)[0] > 1:
                counts[send._replace(calls=0)] += send.calls  # type: ignore[assignment]
    for send, calls in counts.items():
        yield send._replace(calls=calls)


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
            yield Send("tp", "all_gather", "loss: sums of exponentials", 16.0 * part * grid.tp, calls, False)
            yield Send("tp", "reduce_scatter", "loss: gradients of tokens", setting.low * part * D, calls, False)
        if model.extra is not None:
            yield Send("cp", "all_gather", "following tokens", 16.0 * grid.cp, 2 * times, False)
            for send in of_layer(setting, model.extra):
                yield send._replace(calls=send.calls * times)


def of_borders(setting: Setting, held: Held) -> Iterator[engines.Send]:
    """What a stage of a pipeline sends to its neighbours."""
    Send, model, times = engines.Send, setting.model, setting.micro_batches
    received, sent, ends_apart = borders(setting, held)
    for what, size in sent:
        yield Send("pp", "send_recv", what, size, times, False)
    for what, size in received:
        yield Send("pp", "send_recv", f"gradients of {what}", size, times, False)
    if ends_apart and (held.first or held.last) and doubled(model):
        part = next(p.held(setting.way.cutting) for p in model.ends if p.name == "embedding.weight")
        size = BYTES * part.shard(setting.grid.size("shard_cp"))
        yield Send("pp", "send_recv", "embedding's gradient", size, 1, False)


Tensors = tuple[tuple[str, float], ...]


def borders(setting: Setting, held: Held) -> tuple[Tensors, Tensors, bool]:
    """(what comes from another rank's stage, what goes to one, whether another rank has the other end of the pipeline)."""
    if setting.grid.pp == 1:
        return (), (), False
    plan = setting.model.plan(setting.config, setting.grid)
    own = plan.holder(held.number)
    before = not held.first and plan.holder(held.number - 1) != own
    after = not held.last and plan.holder(held.number + 1) != own
    return (
        border(setting, held.at) if before else (),
        border(setting, held.at + len(held.kinds)) if after else (),
        plan.holder(0) != plan.holder(plan.stages - 1),
    )


def border(setting: Setting, edge: int) -> Tensors:
    """(what, bytes) of each tensor that goes from layer edge - 1 to layer edge; see pretrain/model/stage.py."""
    model = setting.model
    layers = model.layers if model.extra is None else (*model.layers, model.extra)
    first, last, contextual = setting.once("routing layers", lambda: _routing(layers))
    a_channel = 4.0 * setting.tokens / setting.grid.tp
    tensors = [("residual stream", a_channel * model.width)]
    if first < edge <= last:
        tensors.append(("router state", a_channel * max(kind.routes for kind in layers)))
    if contextual < edge:
        tensors.append(("auxiliary loss", 4.0))
    return tuple(tensors)


def _routing(layers: Sequence[Kind]) -> tuple[int, int, int]:
    """The first and the last layer with a router state of its own, and the first that may add an auxiliary loss."""
    routing = [number for number, kind in enumerate(layers) if kind.routes] or [len(layers)]
    adding = [number for number, kind in enumerate(layers) if kind.contextual] or [len(layers)]
    return routing[0], routing[-1], adding[0]
