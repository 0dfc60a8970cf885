"""What the data-parallel engines hold and send: parallel/engines/ and parallel/gradients.py in numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parallel.engines import DeepSpeedConfig, TorchConfig
from parallel.gradients import BUCKET
from parallel.grid import Grid
from pretrain.config import RunConfig
from pretrain.estimate.parameters import BYTES, Weighed, buckets
from pretrain.estimate.update import Updated, scratch


@dataclass(frozen=True)
class Group:
    """Parameters that are gathered and freed together: a layer's, or all that are around the layers. count: such groups."""

    what: str
    weighed: Weighed
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


class Stays(NamedTuple):
    """What layers leave behind, in bytes for each of their elements.

    fresh: a backward pass makes gradients anew, and does not add to those that are there. sharded, spread: gradients that come
    layer by layer, of what the engine shards and of experts that are spread over ranks; 0 where they are there before. gathered:
    whole parameters from a layer's forward to its backward pass; between: from its backward to the next forward pass; at_work, in
    bytes as it is: of layers that are gathered for a moment, where others may be there `between`.
    """

    fresh: bool
    sharded: float = 0.0
    spread: float = 0.0
    gathered: float = 0.0
    between: float = 0.0
    at_work: float = 0.0


@dataclass(frozen=True)
class State:
    """Bytes on a rank. gradients: those of a step's end, or, where whole ones add up over micro-batches, those.

    gathered: what an engine holds besides while the layers work: whole parameters, and buffers of its messages. scratch: of the
    update. growing: gradients come during the only backward pass of a step, layer by layer, as `stays` says.
    """

    elements: int
    weights: float
    gradients: float
    optimizer: float
    gathered: float
    scratch: float
    growing: bool
    stays: Stays


def state(config: RunConfig, grid: Grid, groups: Sequence[Group], micro_batches: int) -> State:
    """What a rank holds between steps, and what it gathers within them."""
    if isinstance(config.engine, DeepSpeedConfig):
        return _deepspeed_state(config.engine, grid, groups, micro_batches)
    ranks = grid.size("shard_cp")
    whole = sum(group.weighed.whole * group.count for group in groups)
    sharded = sum(group.weighed.padded // ranks * group.count for group in groups)
    held = sum(group.weighed.shard * group.count for group in groups)
    spread = sum(group.weighed.spread * group.count for group in groups)
    decayed, others = (sum(group.weighed.updated[i] * group.count for group in groups) for i in (0, 1))
    orthogonalised = sum(group.weighed.orthogonalised * group.count for group in groups)
    largest = max((group.weighed.largest for group in groups), default=0)
    updated = Updated(decayed, others, orthogonalised, largest)
    accumulates = micro_batches > 1 and not config.engine.reduce_each_micro_batch and ranks > 1
    weights = BYTES * (sharded + spread)
    stays = _stays(config.engine, grid, groups, micro_batches, accumulates)
    return State(
        elements=held + spread,
        weights=weights,
        gradients=BYTES * (whole + spread) if accumulates else weights,
        optimizer=BYTES * sum(group.weighed.moments * group.count for group in groups),
        gathered=_gathered(config.engine, grid, groups, stays) if ranks > 1 else 0.0,
        scratch=scratch(config.optimizer, updated),
        growing=micro_batches == 1,
        stays=stays,
    )


def _gathered(engine: TorchConfig, grid: Grid, groups: Sequence[Group], stays: Stays) -> float:
    """Bytes that FSDP2 holds besides while a layer works, but for what `stays` says.

    Around the layers: whole parameters, from their first use to the end of the backward pass. Of layers, or units of them: the
    one at work whole; those that are gathered ahead, flat; and one flat buffer that has been read, but is not yet free: in the
    forward pass of the gather before, in the backward pass of the reduction before.
    """
    around = sum(group.weighed.padded for group in groups if group.root)
    units = [group for group in groups if not group.root]
    largest = max((unit.weighed.padded for unit in units), default=0)
    if engine.reshard_after_forward:
        held = largest + (0 if stays.at_work else _at_work(engine, groups))
    elif grid.pp > 1:  # over all micro-batches everything stays
        held = largest + sum(unit.weighed.padded * unit.count for unit in units)
    else:  # the last layer's flat buffer, and the one before
        held = 2 * largest
    return float(BYTES * (around + held))


def _at_work(engine: TorchConfig, groups: Sequence[Group]) -> int:
    """Elements of a unit and of those that are gathered ahead."""
    units = [group for group in groups if not group.root]
    ahead = min(engine.prefetch, max(0, sum(unit.count for unit in units) - 1))
    return max((unit.weighed.padded for unit in units), default=0) * (1 + ahead)


def _stays(engine: TorchConfig, grid: Grid, groups: Sequence[Group], micro_batches: int, accumulates: bool) -> Stays:
    ranks = grid.size("shard_cp")
    grows = float(BYTES) if micro_batches == 1 else 0.0
    if ranks == 1:
        return Stays(micro_batches == 1, grows, grows)
    if grid.pp > 1 and engine.reshard_after_forward:  # see `sends`
        at_work = float(BYTES * _at_work(engine, groups))
        return Stays(not accumulates, grows / ranks, grows, between=float(BYTES), at_work=at_work)
    gathered = 0.0 if grid.pp > 1 or engine.reshard_after_forward else float(BYTES)
    return Stays(not accumulates, grows / ranks, grows, gathered)


def sends(
    config: RunConfig, grid: Grid, groups: Sequence[Group], order: Sequence[Weighed], micro_batches: int
) -> Iterator[Send]:
    """Collectives of a step. order: all parameters of the rank, in the model's order."""
    if isinstance(config.engine, DeepSpeedConfig):
        yield from _deepspeed_sends(config.engine, grid, groups, micro_batches)
        yield from _over_edp(grid, order, BUCKET)
        return
    bucket = config.engine.bucket_bytes or BUCKET
    ranks = grid.size("shard_cp")
    if ranks > 1:
        each = config.engine.reduce_each_micro_batch
        for group in groups:
            size = BYTES * group.weighed.padded
            # A pipeline frees parameters after forward passes only: a backward pass leaves them for the next forward pass.
            again = config.engine.reshard_after_forward and not group.root
            if grid.pp > 1:
                gathers = micro_batches + 1 if again else 1
            else:
                gathers = micro_batches * (2 if again else 1)
            calls = (micro_batches if each else 1) * group.count
            hidden = not group.root
            yield Send("shard_cp", "all_gather", f"parameters, {group.what}", size, gathers * group.count, hidden)
            yield Send("shard_cp", "reduce_scatter", f"gradients, {group.what}", size, calls, hidden)
            if grid.replicate > 1:
                yield Send("replicate", "all_reduce", f"gradients, {group.what}", size / ranks, calls, hidden)
    elif grid.size("dp_cp") > 1:
        yield from _bucketed("dp_cp", "gradients", (n for weighed in order for n in weighed.sums), bucket)
    if grid.tp > 1:
        yield from _bucketed("tp", "gradients of whole parameters", (n for w in order for n in w.over_tp), bucket)
    yield from _over_edp(grid, order, bucket)


def _over_edp(grid: Grid, order: Sequence[Weighed], bucket: int) -> Iterator[Send]:
    if grid.ep > 1 and grid.size("edp") > 1:
        yield from _bucketed("edp", "gradients of experts", (n for weighed in order for n in weighed.over_edp), bucket)


def _bucketed(axis: str, what: str, elements: Iterable[float], bucket: int) -> Iterator[Send]:
    sizes = list(buckets((BYTES * n for n in elements), bucket))
    if sizes:
        yield Send(axis, "all_reduce", what, sum(sizes) / len(sizes), len(sizes), False)


# --------------------------------------------------------------------------------------------------------------- DeepSpeed

ALIGNMENT = 2  # elements a rank, to which ZeRO's flat groups are filled up
REDUCED = 500_000_000  # elements that are reduced at a time: DeepSpeed's own default, as is the next
LIVE = 1_000_000_000  # elements that stage 3 holds whole at a time, and for which it waits for their next use


def _reduced(config: DeepSpeedConfig) -> int:
    """Elements that are reduced at a time."""
    return REDUCED if config.bucket_bytes is None else max(1, config.bucket_bytes // BYTES)


def _flat_groups(groups: Sequence[Group], ranks: int) -> list[int]:
    """Elements of ZeRO's flat groups, one for each of the optimizer's."""
    unit = ALIGNMENT * ranks
    sizes = [sum(group.weighed.flat[i] * group.count for group in groups) for i in (0, 1)]
    return [-(-size // unit) * unit for size in sizes if size]


def _deepspeed_state(config: DeepSpeedConfig, grid: Grid, groups: Sequence[Group], micro_batches: int) -> State:
    ranks = grid.world
    spread = sum(group.weighed.spread * group.count for group in groups)
    scratch = BYTES * sum(_flat_groups(groups, ranks)) / ranks
    if config.stage == 3:
        own = sum(group.weighed.partitioned * group.count for group in groups) // ranks
        persistent = sum(group.weighed.small_exact * group.count for group in groups)
        whole = sum(group.weighed.whole * group.count for group in groups)
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
        gradients = 0 if config.stage > 1 else gradients
        if config.offload == "parameters":
            weights -= BYTES * own
    live += BYTES * _reduced(config) * (2 if config.overlap_comm else 1)  # one buffer of fixed size
    return State(elements, weights, gradients, optimizer, live, scratch, False, Stays(True))


def _deepspeed_sends(
    config: DeepSpeedConfig, grid: Grid, groups: Sequence[Group], micro_batches: int
) -> Iterator[Send]:
    ranks = grid.world
    if ranks == 1:
        return
    if config.stage < 3:
        elements = sum(group.weighed.whole * group.count for group in groups)
        calls, times = -(-elements // _reduced(config)), 1 if config.stage == 1 else micro_batches
        hidden = config.overlap_comm
        yield Send("world", "all_reduce", "gradients", BYTES * elements / calls, calls * times, hidden)
        for size in _flat_groups(groups, ranks):
            yield Send("world", "all_gather", "parameters", BYTES * size, 1, False)
        yield Send("world", "all_reduce", "gradient norm and its faults", 4.0, 2, False)
        return
    every = sum(group.weighed.partitioned * group.count for group in groups)
    # What is used again soon stays: of a large model, all but the last layers are gathered once more.
    passes = 1 + max(0.0, 1 - LIVE / 2 / every)
    for group in groups:
        large = group.weighed.partitioned - group.weighed.small
        gathers = passes * micro_batches * group.count
        yield Send("world", "all_gather", f"parameters, {group.what}", BYTES * large, gathers, True)
    reductions = -(-every // _reduced(config))
    mean = BYTES * every / reductions
    yield Send("world", "reduce_scatter", "gradients", mean, reductions * micro_batches, config.overlap_comm)
    small = sum(group.weighed.small * group.count for group in groups)
    yield Send("world", "all_gather", "small parameters", BYTES * small, 1, False)
    yield Send("world", "all_reduce", "gradient norm and its faults", 8.0, 2, False)
