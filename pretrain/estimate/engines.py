"""What the data-parallel engines hold and send: parallel/engines/ and parallel/gradients.py in numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parallel.engines import DeepSpeedConfig
from parallel.gradients import BUCKET
from parallel.grid import Grid
from pretrain.config import RunConfig
from pretrain.estimate.parameters import BYTES, Part, buckets


class Group(NamedTuple):
    """Parameters that are gathered and freed together: a layer's, or all that are around the layers. count: such groups."""

    what: str
    parts: tuple[Part, ...]
    count: int
    root: bool


class Send(NamedTuple):
    """A collective of a step: as costs.Collective, without the sizes of the group."""

    axis: str
    op: str
    what: str
    bytes: float
    calls: float
    hidden: bool


@dataclass(frozen=True)
class State:
    """Bytes on a rank. gradients: those of a step's end, or, where whole ones add up over micro-batches, those.

    gathered: whole parameters of the group around the layers, from its first use to the end of the backward pass. unit: of the
    largest layer, whole. scratch: of the update. growing: gradients come during the only backward pass of a step, layer by layer.
    """

    elements: int
    weights: float
    gradients: float
    optimizer: float
    gathered: float
    unit: float
    scratch: float
    growing: bool


def state(config: RunConfig, grid: Grid, groups: Sequence[Group], micro_batches: int) -> State:
    """What a rank holds between steps, and what it gathers within them."""
    if isinstance(config.engine, DeepSpeedConfig):
        return _deepspeed_state(config.engine, grid, groups, micro_batches)
    ranks = grid.size("shard_cp")
    whole = sharded = spread = held = 0
    unit = gathered = 0
    scratch = {True: 0, False: 0}
    for group in groups:
        padded = own = 0
        for part in group.parts:
            if part.spread:
                spread += part.elements * group.count
                scratch[part.decays] += part.elements * group.count
                continue
            padded += part.padded(ranks)
            own += part.shard(ranks)
            scratch[part.decays] += part.shard(ranks) * group.count
        sharded += padded // ranks * group.count
        held += own * group.count
        whole += sum(part.elements for part in group.parts if not part.spread) * group.count
        if ranks > 1:
            gathered, unit = (gathered + padded, unit) if group.root else (gathered, max(unit, padded))
    accumulates = micro_batches > 1 and not config.engine.reduce_each_micro_batch and ranks > 1
    weights = BYTES * (sharded + spread)
    return State(
        elements=held + spread,
        weights=weights,
        gradients=BYTES * (whole + spread) if accumulates else weights,
        optimizer=2.0 * BYTES * (held + spread),
        gathered=BYTES * gathered,
        unit=BYTES * unit,
        scratch=BYTES * max(scratch.values()),  # the optimizer's square roots, a whole group at a time
        growing=micro_batches == 1,
    )


def sends(
    config: RunConfig, grid: Grid, groups: Sequence[Group], order: Sequence[Part], micro_batches: int
) -> Iterator[Send]:
    """Collectives of a step. order: all parameters of the rank, in the model's order."""
    if isinstance(config.engine, DeepSpeedConfig):
        yield from _deepspeed_sends(config.engine, grid, groups, micro_batches)
        yield from _over_edp(grid, order)
        return
    ranks = grid.size("shard_cp")
    if ranks > 1:
        each = config.engine.reduce_each_micro_batch
        for group in groups:
            size = BYTES * sum(part.padded(ranks) for part in group.parts if not part.spread)
            if not size:
                continue
            # A pipeline frees parameters after forward passes only: a backward pass leaves them for the next forward pass.
            again = config.engine.reshard_after_forward and not group.root
            if grid.pp > 1:
                gathers = micro_batches + 1 if again else 1
            else:
                gathers = micro_batches * (2 if again else 1)
            yield Send(
                "shard_cp", "all_gather", f"parameters, {group.what}", size, gathers * group.count, not group.root
            )
            calls = (micro_batches if each else 1) * group.count
            yield Send("shard_cp", "reduce_scatter", f"gradients, {group.what}", size, calls, not group.root)
            if grid.replicate > 1:
                yield Send("replicate", "all_reduce", f"gradients, {group.what}", size / ranks, calls, not group.root)
    else:
        yield from _bucketed("dp_cp", "gradients", [part.elements for part in order if not part.spread])
    if grid.tp > 1:
        sizes = []
        for part in order:
            if not part.cut:
                sizes.append(part.shard(ranks))
            elif part.copied and not part.spread:
                sizes.append(part.copied / ranks)
        yield from _bucketed("tp", "gradients of whole parameters", sizes)
    yield from _over_edp(grid, order)


def _over_edp(grid: Grid, order: Sequence[Part]) -> Iterator[Send]:
    if grid.size("edp") > 1:
        yield from _bucketed("edp", "gradients of experts", [part.elements for part in order if part.spread])


def _bucketed(axis: str, what: str, elements: Sequence[float]) -> Iterator[Send]:
    sizes = list(buckets((BYTES * n for n in elements), BUCKET))
    if sizes:
        yield Send(axis, "all_reduce", what, sum(sizes) / len(sizes), len(sizes), False)


# --------------------------------------------------------------------------------------------------------------- DeepSpeed

ALIGNMENT = 2  # elements a rank, to which ZeRO's flat groups are filled up
REDUCED = 500_000_000  # elements that are reduced at a time: DeepSpeed's own default, as is the next
LIVE = 1_000_000_000  # elements that stage 3 holds whole at a time, and for which it waits for their next use


def _flat_groups(groups: Sequence[Group], ranks: int) -> list[int]:
    """Elements of ZeRO's flat groups, one for each of the optimizer's."""
    sizes = {True: 0, False: 0}
    for group in groups:
        for part in group.parts:
            if not part.spread:
                sizes[part.decays] += part.elements * group.count
    unit = ALIGNMENT * ranks
    return [-(-size // unit) * unit for size in sizes.values() if size]


def _deepspeed_state(config: DeepSpeedConfig, grid: Grid, groups: Sequence[Group], micro_batches: int) -> State:
    ranks = grid.world
    spread = sum(part.elements * group.count for group in groups for part in group.parts if part.spread)
    scratch = BYTES * sum(_flat_groups(groups, ranks)) / ranks
    if config.stage == 3:
        own = sum(-(-part.elements // ranks) * group.count for group in groups for part in group.parts)
        persistent = sum(
            part.elements * group.count for group in groups for part in group.parts if part.elements < config.keep_whole
        )
        whole = sum(part.elements * group.count for group in groups for part in group.parts)
        # Shards, whole small parameters, and the optimizer's own fp32 copy of the shards.
        weights = BYTES * (2 * own + persistent)
        gradients, elements = BYTES * own, own
        live = float(BYTES * min(LIVE, whole - persistent))
    else:
        flat = sum(_flat_groups(groups, ranks))
        own = flat // ranks
        weights = BYTES * (flat + own + spread)
        gradients = BYTES * ((flat if config.stage == 1 else own) + spread)
        live, elements = 0.0, own + spread
    optimizer = 2.0 * BYTES * (own + spread)
    if config.offload != "none":  # in the host's memory
        optimizer, weights = 0.0, weights - BYTES * own
        gradients = 0.0 if config.stage > 1 else gradients
        if config.offload == "parameters":
            weights -= BYTES * own
    live += BYTES * REDUCED * (2 if config.overlap_comm else 1)  # one buffer of fixed size
    return State(elements, weights, gradients, optimizer, live, 0.0, scratch, False)


def _deepspeed_sends(
    config: DeepSpeedConfig, grid: Grid, groups: Sequence[Group], micro_batches: int
) -> Iterator[Send]:
    ranks = grid.world
    if ranks == 1:
        return
    if config.stage < 3:
        elements = sum(part.elements * group.count for group in groups for part in group.parts if not part.spread)
        calls, times = -(-elements // REDUCED), 1 if config.stage == 1 else micro_batches
        hidden = config.overlap_comm
        yield Send("world", "all_reduce", "gradients", BYTES * elements / calls, calls * times, hidden)
        for size in _flat_groups(groups, ranks):
            yield Send("world", "all_gather", "parameters", BYTES * size, 1, False)
        yield Send("world", "all_reduce", "gradient norm and its faults", 4.0, 2, False)
        return
    every = sum(_partitioned(part, ranks) * group.count for group in groups for part in group.parts)
    for group in groups:
        large = sum(_partitioned(part, ranks) for part in group.parts if part.elements >= config.keep_whole)
        # What is used again soon stays: of a large model, all but the last layers are gathered once more.
        passes = 1 + max(0.0, 1 - LIVE / 2 / every)
        if large:
            times = passes * micro_batches * group.count
            yield Send("world", "all_gather", f"parameters, {group.what}", BYTES * large, times, True)
    calls = -(-every // REDUCED)
    yield Send(
        "world", "reduce_scatter", "gradients", BYTES * every / calls, calls * micro_batches, config.overlap_comm
    )
    small = sum(
        _partitioned(part, ranks) * group.count
        for group in groups
        for part in group.parts
        if part.elements < config.keep_whole
    )
    if small:
        yield Send("world", "all_gather", "small parameters", BYTES * small, 1, False)
    yield Send("world", "all_reduce", "gradient norm and its faults", 8.0, 2, False)


def _partitioned(part: Part, ranks: int) -> int:
    """Elements of a parameter that ZeRO has cut into equal parts."""
    return -(-part.elements // ranks) * ranks
