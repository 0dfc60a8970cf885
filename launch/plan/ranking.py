"""What a search has found: the best configuration of each grid, what does not fit, what the run would refuse."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from launch.plan.forecast import Forecast
from parallel.grid import Grid

REFINED = 12  # grids at the top that are looked at closely


@dataclass(frozen=True)
class Refused:
    """A class of layouts that the run would not accept or that do not fit. count: of grids."""

    what: str
    reason: str
    count: int


@dataclass
class Found:
    """ranked: the best configuration of each grid, fastest first. tried: configurations counted. grids: looked at."""

    ranked: list[Forecast] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    tried: int = 0
    grids: int = 0
    closest: Forecast | None = None
    """Of those that do not fit, the one that lacks least."""
    interrupted: bool = False
    """By Ctrl-C: there may be better ones."""


class Ranking:
    def __init__(self, found: Found):
        self.found = found
        self.best: dict[tuple[Any, ...], Forecast] = {}
        self.short: list[Forecast] = []
        self.lacking: dict[tuple[int, ...], list[Forecast]] = {}

    def add(self, trials: list[Forecast]) -> None:
        for each in trials:
            if not each.fits:
                self.short.append(each)
                continue
            key = _key(each.grid)
            if key not in self.best or each.time.seconds < self.best[key].time.seconds:
                self.best[key] = each

    def take_short(self) -> list[Forecast]:
        """Those that do not fit, the fastest first; each is handed out once."""
        short, self.short = sorted(self.short, key=lambda each: each.time.seconds), []
        return short

    def threshold(self, grid: Grid) -> float:
        """Seconds below which a configuration of this grid is worth having: better than its own best, or among the best."""
        own = self.best.get(_key(grid))
        times = sorted(each.time.seconds for each in self.best.values())
        last = times[REFINED - 1] if len(times) >= REFINED else math.inf
        return last if own is None else min(last, own.time.seconds)

    def lack(self, trial: Forecast) -> None:
        """Of these, nothing fits."""
        self.lacking.setdefault((trial.grid.pp, trial.grid.tp, trial.grid.cp), []).append(trial)

    def of(self, grid: Grid) -> Forecast:
        """The best of the grid so far."""
        return self.best[_key(grid)]

    def leaders(self, most: int) -> list[Forecast]:
        return sorted(self.best.values(), key=lambda each: each.time.seconds)[:most]

    def finish(self) -> None:
        """Writes down what is left."""
        for trial in self.take_short():
            self.lack(trial)
        # Among equals, the one with fewer axes.
        self.found.ranked = sorted(self.best.values(), key=lambda each: (round(each.time.seconds, 9), _axes(each.grid)))
        fine = {(each.grid.pp, each.grid.tp, each.grid.cp) for each in self.best.values()}
        rows = []
        for (pp, tp, cp), trials in self.lacking.items():
            if (pp, tp, cp) in fine:
                continue
            least = min(trials, key=lambda each: each.excess)
            needs = f"{least.costs.peak / 2**30:,.4g} GiB of {least.room / 2**30:.4g}"
            if least.excess > least.costs.activations:
                needs += ", most of them not activations: recomputation cannot help"
            sizes = ", ".join(f"{axis} = {size}" for axis, size in (("pp", pp), ("tp", tp), ("cp", cp)))
            rows.append(
                (least.excess, Refused(sizes, f"does not fit: at least {needs}", len({t.grid for t in trials})))
            )
        self.found.refused += [row for _, row in sorted(rows, key=lambda row: row[0])]
        if not self.best:
            every = [trial for trials in self.lacking.values() for trial in trials]
            self.found.closest = min(every, key=lambda each: each.excess, default=None)


def _key(grid: Grid) -> tuple[Any, ...]:
    """Grids that differ in how dp is split into replicas, or in how experts are cut, are one."""
    return (grid.pp, grid.dp, grid.cp, grid.tp, grid.ep)


def _axes(grid: Grid) -> int:
    return sum(size > 1 for size in (grid.pp, grid.cp, grid.tp, grid.ep))
