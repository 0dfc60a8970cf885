"""How long a step takes on one rank, and where the time goes.

Of a pipeline, the rank with the most to do sets the pace; the others' work is what fills and drains it, and what they wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from launch.plan.chip import Chip
from parallel.fabric.topology import Fabric
from pretrain.config import RunConfig
from pretrain.estimate.costs import Collective, Matmul, RankCosts, StageCosts

# What one byte that a forward pass keeps for its backward moves through memory: written, read by what comes next, read in the
# backward pass, and its gradient written and read.
TRAFFIC = 5.0
# Bytes a parameter that an update reads and writes. FUSED: AdamW by torch's fused kernel, four arrays read and three written.
# UPDATE: 12 arrays read or written more than once, as torch's foreach form does it. And the gradient norm.
FUSED = 28.0
UPDATE = 84.0
CLIP = 8.0
# Under autocast each fp32 weight is read and its bf16 copy written, once a micro-batch, and its gradient is read in bf16, added
# to the fp32 one: bytes a weight. In fp32 it is only added.
CASTS = {"bf16": 4.0 + 2.0 + 2.0 + 8.0, "fp32": 12.0}
# Parameters that are gathered are copied into a message and out of it, gradients into it and added up after it: read and written
# each time: so many times the whole buffer, and what a rank holds alone.
COPIES = {"all_gather": (2.0, 2.0), "reduce_scatter": (2.0, 3.0)}
HOST_LINK = 25e9  # bytes/s between a GPU and its host's memory that one GPU gets
HOST_STREAM = 20e9  # bytes/s of host memory that one rank's optimizer gets, where it is offloaded
# Axes over which parameters are gathered and gradients summed; other messages carry activations.
STATE_AXES = frozenset({"dp", "replicate", "shard", "dp_cp", "shard_cp", "edp", "dp_cp_tp", "world"})


@dataclass(frozen=True)
class Message:
    """A collective with its seconds a step: all of them, and those that computation does not hide."""

    collective: Collective
    seconds: float
    exposed: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the rank that sets the pace. seconds: their sum.

    products: matrix products, of which `small` more than at the ceiling's rate. arithmetic: other FLOPs. memory: element-wise
    work, casts and copies around messages. recomputed: activations computed again. optimizer: update and gradient norm.
    exposed: messages that nothing hides. idle: waiting for other pipeline stages.
    """

    products: float
    small: float
    arithmetic: float
    memory: float
    recomputed: float
    optimizer: float
    exposed: float
    idle: float
    messages: tuple[Message, ...]

    @property
    def computing(self) -> float:
        return self.products + self.arithmetic + self.memory + self.recomputed

    @property
    def busy(self) -> float:
        return self.computing + self.optimizer + self.exposed

    @property
    def seconds(self) -> float:
        return self.busy + self.idle

    @property
    def hidden(self) -> float:
        return sum(message.seconds - message.exposed for message in self.messages)


def step_time(
    costs: RankCosts, config: RunConfig, chip: Chip, fabric: Fabric, kept: float, overlap: float = 1.0
) -> StepTime:
    """kept: bytes that the forward pass of one micro-batch through all layers would keep on these ranks without recomputation."""
    useful = sum(stage.flops for stage in costs.stages) or 1.0
    each = [
        _stage(stage, costs, config, chip, fabric, kept * stage.flops / useful, overlap) for stage in _unlike(costs)
    ]
    slowest = max(each, key=lambda time: time.busy)
    of_stage = dict(zip((id(stage) for stage in _unlike(costs)), each))
    others = sum(_time_of(stage, costs, of_stage).computing for stage in costs.stages) - slowest.computing
    # With equal stages this is bubble / (1 - bubble) of the work: what a schedule leaves idle in proportion to the others' work.
    mean = others / (len(costs.stages) - 1) if len(costs.stages) > 1 else 0.0
    return replace(slowest, idle=mean * costs.bubble / (1.0 - costs.bubble))


def _unlike(costs: RankCosts) -> list[StageCosts]:
    """Stages, each kind once: those in the middle of a pipeline are often alike but for the layers' numbers."""
    seen: dict[tuple[float, ...], StageCosts] = {}
    for stage in costs.stages:
        seen.setdefault(_likeness(stage), stage)
    return list(seen.values())


def _likeness(stage: StageCosts) -> tuple[float, ...]:
    sent = sum(message.total for message in stage.collectives)
    return (stage.parameters, stage.flops, stage.recomputed, len(stage.collectives), sent, len(stage.matmuls))


def _time_of(stage: StageCosts, costs: RankCosts, of_stage: dict[int, StepTime]) -> StepTime:
    if id(stage) in of_stage:
        return of_stage[id(stage)]
    like = _likeness(stage)
    return next(of_stage[id(other)] for other in costs.stages if id(other) in of_stage and _likeness(other) == like)


def update_bytes(config: RunConfig) -> float:
    """That an update reads and writes for each parameter."""
    optimizer = config.optimizer
    fused = optimizer.kind == "muon" or (optimizer.kind == "adamw" and optimizer.fuses("cuda"))
    return FUSED if fused else UPDATE


def _stage(
    stage: StageCosts,
    costs: RankCosts,
    config: RunConfig,
    chip: Chip,
    fabric: Fabric,
    kept: float,
    overlap: float,
) -> StepTime:
    width = 2 if config.train.precision == "bf16" else 4
    products = sum(matmul.calls * _three(matmul, chip, width) for matmul in stage.matmuls)
    plain = sum(3.0 * matmul.calls * matmul.flops for matmul in stage.matmuls)
    arithmetic = chip.arithmetic(max(0.0, stage.flops - plain))
    weights = sum(matmul.calls * matmul.n * matmul.k for matmul in stage.matmuls)
    moved = TRAFFIC * kept * costs.micro_batches + CASTS[config.train.precision] * weights + _copied(stage.collectives)
    memory = chip.stream(moved)
    recomputed = 0.0
    if stage.flops > 0.0 and stage.recomputed > 0.0:
        recomputed = (products + arithmetic) * stage.recomputed / stage.flops
    if config.train.recompute != "none":
        recomputed += chip.stream(2.0 * kept * costs.micro_batches)  # written and read once more
    update = (update_bytes(config) + (CLIP if config.train.clip is not None else 0.0)) * stage.parameters
    offload = getattr(config.engine, "offload", "none") != "none"
    optimizer = 8.0 * stage.parameters / HOST_LINK + update / HOST_STREAM if offload else chip.stream(update)
    optimizer += stage.update / chip.ceiling  # its own matrix products
    computing = products + arithmetic + memory + recomputed
    messages = _messages(stage.collectives, config, fabric, computing, costs.micro_batches, overlap)
    return StepTime(
        products,
        max(0.0, products - plain / chip.ceiling),
        arithmetic,
        memory,
        recomputed,
        optimizer,
        sum(message.exposed for message in messages),
        0.0,
        messages,
    )


def _copied(collectives: Sequence[Collective]) -> float:
    """Bytes that are read and written around the messages of parameters and their gradients."""
    moved = 0.0
    for each in collectives:
        if each.axis in STATE_AXES and each.op in COPIES and each.ranks > 1:
            whole, own = COPIES[each.op]
            moved += each.total * (whole + own / each.ranks)
    return moved


def _three(matmul: Matmul, chip: Chip, width: int) -> float:
    """Seconds of the forward product, of the input's gradient and of the weight's."""
    m, n, k = matmul.m, float(matmul.n), float(matmul.k)
    return chip.product(m, n, k, width) + chip.product(m, k, n, width) + chip.product(k, n, m, width)


def _messages(
    collectives: Sequence[Collective],
    config: RunConfig,
    fabric: Fabric,
    computing: float,
    micro_batches: int,
    overlap: float,
) -> tuple[Message, ...]:
    """What may overlap does so with the computation of the micro-batches in which it is sent, but for the first or last call.

    Gradients that are summed once a step can hide only behind the last micro-batch's backward pass.
    """
    seconds = [
        fabric.seconds(each.op, each.bytes, each.ranks, each.ranks_in_node) if each.ranks > 1 else 0.0
        for each in collectives
    ]
    totals = [each.calls * one for each, one in zip(collectives, seconds)]
    exposed = list(totals)
    each_micro_batch = bool(getattr(config.engine, "reduce_each_micro_batch", False))
    backward = computing * 2.0 / 3.0 / (1 if each_micro_batch else micro_batches)
    windows = {True: overlap * backward, False: overlap * computing}
    groups: dict[bool, list[int]] = {True: [], False: []}
    for index, each in enumerate(collectives):
        if each.hidden and totals[index] > 0.0:
            groups[each.axis in STATE_AXES and each.op in ("reduce_scatter", "all_reduce")].append(index)
    left = {kind: _left([(totals[i], seconds[i]) for i in group], windows[kind]) for kind, group in groups.items()}
    # Both kinds use the same links and hide behind the same computation.
    together = sum(totals[i] for group in groups.values() for i in group) - overlap * computing
    more = max(1.0, together / sum(left.values())) if sum(left.values()) > 0.0 else 1.0
    for kind, group in groups.items():
        for i in group:
            share = left[kind] / sum(totals[j] for j in group)
            exposed[i] = min(totals[i], totals[i] * share * more)
    return tuple(Message(each, total, still) for each, total, still in zip(collectives, totals, exposed, strict=True))


def _left(messages: Sequence[tuple[float, float]], window: float) -> float:
    """Of messages (seconds in all, seconds of one call): what does not fit beside `window` seconds, one call at least."""
    total = sum(each for each, _ in messages)
    if total <= 0.0 or window <= 0.0:
        return total
    return max(total - window, min(total, max(one for _, one in messages)))
