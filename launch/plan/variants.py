"""What an engine, a group of shards and a pipeline offer on one grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from launch.plan.legal import divisors
from launch.plan.source import with_
from parallel.engines import TorchConfig
from parallel.engines.deepspeed import DeepSpeedConfig
from parallel.grid import Grid
from pretrain.config import RunConfig


def engine_is_fixed(fixed: frozenset[str]) -> bool:
    return any(key.startswith("engine") for key in fixed)


def shardings(config: RunConfig, grid: Grid, node: int, fixed: frozenset[str]) -> Iterator[RunConfig]:
    """How state is spread over the data-parallel ranks: over all, inside a node, not at all; or by ZeRO."""
    replicates = {config.mesh.replicate}
    if "mesh.replicate" not in fixed and config.engine.kind == "torch":
        replicates |= {1, grid.dp} if grid.pp == 1 else {1}
        for shard in (1, 2, 4) if grid.pp == 1 else (1,):  # nodes
            inside = max(1, shard * node // (grid.cp * grid.tp))
            if grid.dp % inside == 0:
                replicates.add(grid.dp // inside)
    for replicate in sorted(replicates):
        yield with_(config, mesh={"replicate": replicate})
    if not engine_is_fixed(fixed) and grid.pp == grid.tp == 1 and grid.dp * grid.cp > 1:
        for stage in (1, 2, 3):
            yield config.model_copy(update={"engine": DeepSpeedConfig(stage=stage, overlap_comm=True)})


def refinements(config: RunConfig, grid: Grid, layers: int, node: int, fixed: frozenset[str]) -> Iterator[RunConfig]:
    """One other choice at a time: another sharding, gathered parameters kept, gradients
    reduced early, schedules, cut experts."""
    engines: list[Any] = [config.engine]
    if not engine_is_fixed(fixed) and config.engine.kind == "torch":
        engines.append(TorchConfig(reshard_after_forward=False))
        if grid.pp == 1:
            engines.append(TorchConfig(reduce_each_micro_batch=True))
    schedules: list[dict[str, Any]] = [{}]
    if grid.pp > 1 and not {"mesh.pp_schedule", "mesh.pp_virtual", "mesh.pp_layers"} & fixed:
        schedules = [{"pp_schedule": "1f1b", "pp_virtual": None}]
        if 2 * grid.pp <= layers:
            schedules += [{"pp_schedule": name, "pp_virtual": None} for name in ("interleaved", "zbv")]
        if 4 * grid.pp <= layers:
            schedules.append({"pp_schedule": "interleaved", "pp_virtual": 4})
    sparse = any(hasattr(ffn, "experts") for ffn in config.model.ffns.values())
    cuts = [config.mesh.expert_tensor]
    if grid.tp > 1 and sparse and "mesh.expert_tensor" not in fixed:
        cuts = [False, True]
    yield from shardings(config, grid, node, fixed)
    if config.engine.kind != "torch" and not engine_is_fixed(fixed):
        yield from shardings(config.model_copy(update={"engine": TorchConfig()}), grid, node, fixed)
    for engine in engines:
        yield config.model_copy(update={"engine": engine})
    for schedule in schedules:
        yield with_(config, mesh=schedule)
    for cut in cuts:
        yield with_(config, mesh={"expert_tensor": cut})
    if config.engine.kind == "torch" and "mesh.replicate" not in fixed:
        for replicate in divisors(grid.dp):
            yield with_(config, mesh={"replicate": replicate})
