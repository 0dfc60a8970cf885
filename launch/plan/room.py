"""What would make a job fit that does not: the smallest changes first, each asked of the run's own checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launch.plan.forecast import Forecast, Planner
from launch.plan.legal import Legality, divisors
from launch.plan.source import MOST_GPUS, with_
from pretrain.config import RunConfig

Change = dict[str, Any]
"""Dotted keys with their values; `gpus` for more of them."""


@dataclass(frozen=True)
class Remedy:
    changes: Change
    forecast: Forecast

    @property
    def text(self) -> str:
        return " ".join(f"--gpus {v}" if k == "gpus" else f"{k}={_text(v)}" for k, v in self.changes.items())


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def remedies(planner: Planner, legality: Legality, forecast: Forecast, most: int = 4) -> list[Remedy]:
    """Layouts that fit, at most so many, of each kind of change the least; nothing if none is found."""
    found: list[Remedy] = []
    for changes in _changes(planner, forecast):
        if len(found) >= most:
            break
        if any(set(remedy.changes) <= set(changes) for remedy in found):
            continue  # less of the same is enough
        remedy = _try(planner, legality, forecast.config, forecast.grid.world, changes)
        if remedy is not None:
            found.append(remedy)
    return found


def _try(planner: Planner, legality: Legality, config: RunConfig, gpus: int, changes: Change) -> Remedy | None:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        if key == "gpus":
            gpus = value
        else:
            section, _, field = key.partition(".")
            sections.setdefault(section, {})[field] = value
    if any(axis in sections.get("mesh", {}) for axis in ("tp", "pp", "cp")) or "gpus" in changes:
        sections.setdefault("mesh", {})["dp"] = None
    changed = with_(config, **sections)
    try:
        grid = changed.mesh.grid(gpus)
    except ValueError:
        return None
    if legality.refusal(changed, grid) is not None:
        return None
    result = planner.forecast(changed, grid)
    return Remedy(changes, result) if result.fits else None


def _changes(planner: Planner, forecast: Forecast) -> Iterator[Change]:
    config, grid = forecast.config, forecast.grid
    lighter: list[Change] = []
    modes = {"none": ["selective", "full"], "selective": ["full"], "full": []}[config.train.recompute]
    lighter += [{"train.recompute": mode} for mode in modes]
    if config.train.micro_batch > 1:
        lighter += [{"train.micro_batch": size} for size in reversed(divisors(config.train.micro_batch)[:-1])]
    if config.engine.kind == "torch":
        if not config.engine.reshard_after_forward:
            lighter.append({"engine.reshard_after_forward": True})
        if not config.engine.reduce_each_micro_batch and grid.pp == 1 and forecast.costs.micro_batches > 1:
            lighter.append({"engine.reduce_each_micro_batch": True})
        if config.mesh.replicate > 1:
            lighter.append({"mesh.replicate": 1})
    else:
        lighter += [{"engine.stage": stage} for stage in (2, 3) if stage > config.engine.stage]
        if config.engine.offload == "none":
            lighter.append({"engine.offload": "optimizer"})
    node = planner.question.node
    layers = len(planner.question.model.layers)
    cuts: list[Change] = [
        *({"mesh.tp": size} for size in divisors(node) if size > grid.tp and grid.world % size == 0),
        *({"mesh.ep": size} for size in divisors(grid.stage) if size > grid.ep),
        *({"mesh.pp": size} for size in divisors(grid.world) if grid.pp < size <= layers),
        *({"mesh.cp": size} for size in divisors(grid.world) if grid.cp < size <= 64),
    ]
    more = [{"gpus": size} for size in (grid.world * 2**n for n in range(1, 18)) if size <= MOST_GPUS]
    yield from lighter
    least: Change = {}
    for change in lighter:
        least |= change  # the last of a kind is the lightest
    if len(least) > 1:
        yield least
    yield from cuts
    yield from more
    for change in (*cuts, *more):
        yield least | change
    for cut in cuts:
        for change in more:
            yield least | cut | change
