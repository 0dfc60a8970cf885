"""What a job would be like: one configuration on one grid, in bytes and seconds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from launch.plan.chip import Chip
from launch.plan.source import Question, with_
from launch.plan.step_time import StepTime, step_time
from parallel.engines import TorchConfig
from parallel.grid import Grid
from pretrain.config import RunConfig
from pretrain.estimate.costs import RankCosts
from pretrain.estimate.flops import Work
from pretrain.estimate.layout import rank_costs
from pretrain.estimate.utilization import share


@dataclass(frozen=True)
class Forecast:
    """room: bytes of a device that the job may use. tokens: of the whole run."""

    config: RunConfig
    grid: Grid
    costs: RankCosts
    time: StepTime
    chip: Chip
    room: float
    tokens: float

    @property
    def tokens_a_step(self) -> int:
        return self.config.train.batch * self.config.data.sequence_length

    @property
    def tokens_a_second(self) -> float:
        return self.tokens_a_step / self.time.seconds

    @cached_property
    def flops(self) -> float:
        """Useful FLOPs of a step, of all ranks."""
        return self.grid.world / len(self.costs.stages) * sum(stage.flops for stage in self.costs.stages)

    @cached_property
    def work(self) -> Work:
        """FLOPs of a step on a rank, on average."""
        stages, ranks = self.costs.stages, len(self.costs.stages)
        return Work(
            useful=sum(stage.flops for stage in stages) / ranks,
            recomputed=sum(stage.recomputed for stage in stages) / ranks,
            remade=sum(stage.remade for stage in stages) / ranks,
            update=sum(stage.update for stage in stages) / ranks,
        )

    @property
    def mfu(self) -> float | None:
        """Share of the nominal matrix rate; None if more than that would be computed."""
        return share(self.work, self.time.seconds, self.chip.nominal)

    @property
    def mfu_ceiling(self) -> float | None:
        """Share of what the best matrix product reaches; None if more than that would be computed."""
        return share(self.work, self.time.seconds, self.chip.ceiling)

    @property
    def days(self) -> float:
        """Of the run's tokens, without failures."""
        return self.tokens / self.tokens_a_second / 86400.0

    @property
    def excess(self) -> float:
        """Bytes by which the fullest rank does not fit; below zero: what stays free."""
        return self.costs.peak - self.room

    @property
    def fits(self) -> bool:
        return self.excess <= 0.0


@dataclass
class Planner:
    """Forecasts for one model and one kind of cluster, for any configuration of them."""

    question: Question
    _chips: dict[str, Chip] = field(default_factory=dict)
    _kept: dict[tuple[Any, ...], float] = field(default_factory=dict)

    def chip(self, precision: str) -> Chip:
        if precision not in self._chips:
            self._chips[precision] = Chip.of(self.question.hardware, precision, self.question.efficiency)
        return self._chips[precision]

    def room(self, precision: str) -> float:
        return self.chip(precision).memory * (1.0 - self.question.headroom)

    def costs(self, config: RunConfig, grid: Grid) -> RankCosts:
        return rank_costs(self.question.model, config, grid, self.question.node)

    def forecast(self, config: RunConfig, grid: Grid, costs: RankCosts | None = None) -> Forecast:
        """The grid must be legal for the configuration (legal.py). costs: what `costs` gave, if it has been asked."""
        question, chip = self.question, self.chip(config.train.precision)
        costs = costs or self.costs(config, grid)
        time = step_time(costs, config, chip, question.fabric, self.kept(config, grid), question.overlap)
        return Forecast(config, grid, costs, time, chip, self.room(config.train.precision), question.tokens)

    def kept(self, config: RunConfig, grid: Grid) -> float:
        """Bytes that a micro-batch's forward pass through all layers keeps on a rank, if nothing is computed again."""
        key = (grid.cp, grid.tp, grid.ep, grid.expert_tensor, config.train.micro_batch, config.train.precision)
        if key not in self._kept:
            # Of several micro-batches without a pipeline: nothing but activations comes and goes in each.
            train = {"recompute": "none", "batch": 2 * grid.dp * config.train.micro_batch}
            plain = with_(config, train=train, mesh={"pp": 1, "pp_layers": None, "pp_virtual": None})
            plain = plain.model_copy(update={"engine": TorchConfig()})
            self._kept[key] = self.costs(plain, replace(grid, pp=1)).activations
        return self._kept[key]
