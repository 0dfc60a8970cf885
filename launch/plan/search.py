"""The best legal layouts of a job: every grid, then what the engine and the schedule offer on the best of them.

All factorisations of the number of GPUs over pp, dp, cp, tp and ep that the model allows, each with several ways to shard and all
micro-batches (powers of two). Recomputation never makes a step shorter, so it is tried only for what does not fit and would be
among the best if it did. On the best grids, then, one choice at a time: engine options, schedules, shard groups, cut experts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from launch.plan import variants
from launch.plan.forecast import Forecast, Planner
from launch.plan.legal import Legality, divisors, grids
from launch.plan.ranking import REFINED, Found, Ranking, Refused
from launch.plan.source import with_
from parallel.engines import TorchConfig
from parallel.grid import Grid
from pretrain.config import RunConfig
from pretrain.train import layout

RECOMPUTE = ("none", "selective", "full")  # the fastest first
FEWEST_TOKENS = 512  # of a sequence on one context-parallel rank: below, nothing but messages is left
MOST_MICRO_BATCHES = 8  # sizes of a micro-batch tried on a grid: powers of two from 1

ROUNDS = 4  # of choices on one grid
QUICK_PP = 4

Progress = Callable[[int, int], None]
"""Of (candidates done, in all, as far as is known)."""


@dataclass
class Search:
    """fixed: dotted keys that stay as the configuration has them (those that the user gave)."""

    planner: Planner
    legality: Legality
    fixed: frozenset[str] = frozenset()
    progress: Progress = lambda done, total: None
    _seen: dict[tuple[Any, ...], Forecast] = field(default_factory=dict, repr=False)
    _pace: dict[tuple[int, ...], float] = field(default_factory=dict, repr=False)
    """(cp, tp, ep, micro-batch) -> seconds of computation of a micro-batch, all layers on one rank."""

    def run(self, config: RunConfig, gpus: int, quick: bool = False) -> Found:
        """config: with the batch and sequence length; its layout is replaced but for what is fixed.

        quick: for one point of a curve: no pipelines of more than QUICK_PP ranks unless nothing else runs, and only the best grid
        is tried with all that engines, schedules and shard groups offer.
        """
        refine = 1 if quick else REFINED
        found = Found()
        self._seen.clear()
        ranking = Ranking(found)
        sizes, found.refused = self._sizes(config, gpus)
        open_grids = list(self._grids(config, gpus, sizes, found))
        found.grids = len(open_grids)
        total = len(open_grids) + refine
        try:
            for index, (plain, grid) in enumerate(open_grids):
                self.progress(index, total)
                if quick and grid.pp > QUICK_PP and ranking.best:
                    break  # grids come with pp ascending
                if not self._hopeless(plain, grid, ranking):
                    self._first_look(plain, grid, ranking, found)
            self._recompute(ranking, found)
            for index, leader in enumerate(ranking.leaders(refine)):
                self.progress(len(open_grids) + index, total)
                self._refine(leader, ranking, found)
            self._recompute(ranking, found)
        except KeyboardInterrupt:
            found.interrupted = True
        ranking.finish()
        return found

    def _first_look(self, config: RunConfig, grid: Grid, ranking: Ranking, found: Found) -> None:
        """Every sharding with the smallest micro-batch; larger ones with the two fastest that fit, or lack least."""
        smallest = {"micro_batch": self._micro_batches(config, grid)[0]}
        looks: list[Forecast] = []
        shardings = variants.shardings(config, grid, self.planner.question.node, self.fixed)
        for one, alike in self._legal(shardings, grid.world):
            looks += self._trials(with_(one, train=smallest), alike, found, most=1)
        ranking.add(looks)
        looks.sort(key=lambda each: (max(0.0, each.excess), each.time.seconds))
        for look in looks[: 2 if grid.pp == 1 else 1]:
            ranking.add(self._trials(look.config, look.grid, found, step=2))

    def _hopeless(self, config: RunConfig, grid: Grid, ranking: Ranking) -> bool:
        """Whether a pipeline could not be among the best by its computation and its bubble alone, whatever it sends."""
        if grid.pp == 1:
            return False
        bounds = []
        for micro_batch in self._micro_batches(config, grid):
            pace = self._pace.get((grid.cp, grid.tp, grid.ep, micro_batch))
            if pace is None:
                continue
            micro_batches = config.train.batch // (grid.dp * micro_batch)
            bounds.append(pace / grid.pp * (micro_batches + grid.pp - 1))
        return bool(bounds) and min(bounds) > ranking.threshold(grid)

    def _refine(self, leader: Forecast, ranking: Ranking, found: Found) -> None:
        """One choice at a time, from the best so far, until none is better."""
        layers = len(self.planner.question.model.layers)
        for _ in range(ROUNDS):
            others = variants.refinements(leader.config, leader.grid, layers, self.planner.question.node, self.fixed)
            for one, alike in self._legal(others, leader.grid.world):
                ranking.add(self._trials(one, alike, found))
            self._recompute(ranking, found)
            best = ranking.of(leader.grid)
            if best is leader:
                return
            leader = best

    def _recompute(self, ranking: Ranking, found: Found) -> None:
        """Tries recomputation on what does not fit, but only where it could be among the best: it never makes a step shorter."""
        for trial in ranking.take_short():
            if trial.time.seconds < ranking.threshold(trial.grid):
                lighter = self._lighter(trial, found)
                if lighter is None:
                    ranking.lack(trial)
                else:
                    ranking.add([lighter])

    def _sizes(self, config: RunConfig, gpus: int) -> tuple[dict[str, list[int]], list[Refused]]:
        """(for each axis the sizes that the model allows by themselves, the others with the reason)."""
        allowed: dict[str, list[int]] = {}
        refused: list[Refused] = []
        limits = {
            "pp": len(self.planner.question.model.layers) + 2,
            "cp": max(1, config.data.sequence_length // FEWEST_TOKENS),
        }
        experts = max((getattr(ffn, "experts", None) or 1 for ffn in config.model.ffns.values()), default=1)
        limits["ep"] = experts
        for axis in ("pp", "tp", "cp", "ep"):
            if f"mesh.{axis}" in self.fixed:
                allowed[axis] = [getattr(config.mesh, axis)]
                continue
            allowed[axis] = []
            reasons: dict[str, tuple[str, list[int]]] = {}  # alike but for the numbers in them
            for size in divisors(gpus):
                if size > limits.get(axis, gpus):
                    break
                reason = self._alone(config, axis, size)
                if reason is None:
                    allowed[axis].append(size)
                else:
                    reasons.setdefault(re.sub(r"\d+", "0", reason), (reason, []))[1].append(size)
            for reason, which in reasons.values():
                shown = ", ".join(map(str, which[:5])) + (", ..." if len(which) > 5 else "")
                refused.append(Refused(f"{axis} = {shown}", reason, len(which)))
        if limits["cp"] < gpus and len(allowed["cp"]) > 1:
            text = f"fewer than {FEWEST_TOKENS} tokens of a sequence on a rank"
            refused.append(Refused(f"cp > {limits['cp']}", f"not tried: {text}", 0))
        return allowed, refused

    def _schedule(self) -> dict[str, Any]:
        """The simplest pipeline, but for what is fixed."""
        plain = {"pp_schedule": "1f1b", "pp_virtual": None, "pp_layers": None}
        return {key: value for key, value in plain.items() if f"mesh.{key}" not in self.fixed}

    def _engine(self, config: RunConfig) -> Any:
        """The plainest one, but for what is fixed."""
        return config.engine if variants.engine_is_fixed(self.fixed) else TorchConfig()

    def _alone(self, config: RunConfig, axis: str, size: int) -> str | None:
        if size == 1:
            return None
        mesh = {"pp": 1, "tp": 1, "cp": 1, "ep": 1, "expert_tensor": False, "replicate": 1, "dp": None, axis: size}
        one = with_(config, mesh=mesh | self._schedule())
        if axis == "pp":
            try:
                layout.plan(one, self.legality.model)
            except ValueError as error:
                return str(error)
            return None
        one = one.model_copy(update={"engine": self._engine(config)})
        grid = Grid(shard=size, ep=size) if axis == "ep" else Grid(tp=size) if axis == "tp" else Grid(cp=size)
        return self.legality.of_model(one, grid)

    def _grids(
        self, config: RunConfig, gpus: int, sizes: dict[str, list[int]], found: Found
    ) -> Iterator[tuple[RunConfig, Grid]]:
        """Grids that the model allows, with the smallest micro-batch; those that it does not are noted."""
        refused: Counter[str] = Counter()
        example: dict[str, str] = {}
        for pp, dp, cp, tp in grids(gpus, sizes):
            if "mesh.dp" in self.fixed and config.mesh.dp not in (None, dp):
                continue
            for ep in sizes["ep"]:
                mesh = {
                    "pp": pp, "dp": None, "cp": cp, "tp": tp, "ep": ep,
                    "expert_tensor": config.mesh.expert_tensor if "mesh.expert_tensor" in self.fixed else False,
                    "replicate": config.mesh.replicate if "mesh.replicate" in self.fixed else 1, **self._schedule(),
                }  # fmt: skip
                one = with_(config, mesh=mesh).model_copy(update={"engine": self._engine(config)})
                if "train.micro_batch" not in self.fixed:
                    one = with_(one, train={"micro_batch": 1})
                kind, reason = "", None
                try:
                    grid = one.mesh.grid(gpus)
                except ValueError as error:
                    kind, reason = "experts' ranks", str(error)
                else:
                    if config.train.batch % (dp * one.train.micro_batch) == 0 or "batch" not in refused:
                        reason = self.legality.refusal(one, grid)
                        kind = "" if reason is None else _kind(reason)
                    else:  # that message takes time, and one is enough
                        kind, reason = "batch", ""
                if reason is None:
                    yield one, grid
                else:
                    refused[kind] += 1
                    example.setdefault(kind, reason)
        found.refused += [Refused(kind, example[kind], count) for kind, count in refused.most_common()]

    def _trials(
        self, config: RunConfig, grid: Grid, found: Found, step: int = 1, most: int = MOST_MICRO_BATCHES
    ) -> list[Forecast]:
        """Every micro-batch up to the first that does not fit, that one too, without recomputation unless it is fixed.

        step: 2 for every second one. most: how many.
        """
        mode = config.train.recompute if "train.recompute" in self.fixed else "none"
        trials: list[Forecast] = []
        for micro_batch in self._micro_batches(config, grid)[::step][:most]:
            one = with_(config, train={"micro_batch": micro_batch, "recompute": mode})
            if self.legality.refusal(one, grid) is not None:
                continue
            key = (grid, micro_batch, mode, one.train.batch, *_choices(one))
            if key not in self._seen:
                found.tried += 1
                self._seen[key] = self.planner.forecast(one, grid)
                trials.append(each := self._seen[key])
                if grid.pp == 1 and mode == "none":
                    pace = each.time.computing / each.costs.micro_batches
                    self._pace[grid.cp, grid.tp, grid.ep, micro_batch] = pace
            if not self._seen[key].fits:
                break
        return trials

    def _lighter(self, trial: Forecast, found: Found) -> Forecast | None:
        """One that does not fit, with the least recomputation with which it does; None if there is none."""
        if "train.recompute" in self.fixed or trial.excess > trial.costs.activations:
            return None
        for mode in RECOMPUTE[1:]:
            found.tried += 1
            each = self.planner.forecast(with_(trial.config, train={"recompute": mode}), trial.grid)
            if each.fits:
                return each
        return None

    def _micro_batches(self, config: RunConfig, grid: Grid) -> list[int]:
        if "train.micro_batch" in self.fixed:
            return [config.train.micro_batch]
        own = config.train.batch // grid.dp
        return [size for size in (2**n for n in range(MOST_MICRO_BATCHES)) if own % size == 0]

    def _legal(self, candidates: Iterable[RunConfig], gpus: int) -> Iterator[tuple[RunConfig, Grid]]:
        for one in candidates:
            try:
                grid = one.mesh.grid(gpus)
            except ValueError:
                continue
            yield one, grid


def _choices(config: RunConfig) -> tuple[Any, ...]:
    mesh, engine = config.mesh, config.engine
    return (mesh.pp_schedule, mesh.pp_virtual, engine.kind, *engine.__dict__.values())


def _kind(reason: str) -> str:
    """A short name for a class of refusals."""
    return "batch" if reason.startswith("train.batch") else re.split(r"[:;]", reason)[0][:60]
