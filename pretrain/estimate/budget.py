"""Which parts of which layers to compute again, so that a step fits into a budget of memory.

Every layer has a few ways: keep everything, keep the results of products only, compute its mixer, its FFN, or all of it again.
Each way frees some bytes and costs some FLOPs. The ways worth having of one kind of layer lie on a convex curve of FLOPs over
bytes freed; of all layers together, the steps along these curves are taken cheapest byte first, until the estimate fits. Of
layers alike, the earliest go first: they hold their activations longest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache

from parallel.grid import Grid
from parallel.recompute import Mode
from pretrain.config import ConfigError, RunConfig
from pretrain.estimate.layout import RankCosts, rank_costs
from pretrain.estimate.model import Kind, ModelCosts, Way
from pretrain.estimate.parameters import Cutting
from pretrain.estimate.trace import Traced
from pretrain.estimate.work import recomputed

GIB = 2.0**30
WAYS: tuple[Mode, ...] = ("selective", "mixer", "ffn", "full")
COMPILED: tuple[Mode, ...] = ("full",)  # a compiled layer is one piece, and selective by itself


@dataclass(frozen=True)
class Choice:
    """modes: of each layer of the whole model. peak: bytes of each pipeline rank by the estimate; before: with none of them."""

    modes: tuple[Mode, ...]
    labels: tuple[str, ...]
    peak: tuple[float, ...]
    before: tuple[float, ...]

    def lines(self, budget: float) -> list[str]:
        """For people: what is computed again, and what it comes to."""
        counts = Counter(zip(self.modes, self.labels, strict=True))
        what = [f"{mode} of {n} x ({label})" for (mode, label), n in counts.items() if mode != "none"]
        return [
            f"memory budget {budget:g} GiB: a step takes {max(self.peak) / GIB:.3f} GiB by estimate, "
            f"{max(self.before) / GIB:.3f} GiB without recomputation; computed again: {', '.join(what) or 'nothing'}"
        ]


@dataclass(frozen=True)
class Step:
    """One layer goes from one way to the next. price: FLOPs for each byte that this frees."""

    price: float
    layer: int
    mode: Mode


def choose(config: RunConfig, grid: Grid) -> Choice:
    """The choice for train.memory_budget, the same on all ranks. Raises ConfigError where no choice fits."""
    assert config.train.memory_budget is not None
    return _choose(config.model_dump_json(), grid)


@lru_cache(maxsize=2)
def _choose(dumped: str, grid: Grid) -> Choice:
    config = RunConfig.model_validate_json(dumped)
    return fit(ModelCosts.of(config), config, grid)


def fit(model: ModelCosts, config: RunConfig, grid: Grid) -> Choice:
    """As `choose`, for a model that has been counted already."""
    budget = config.train.memory_budget
    assert budget is not None
    base = _without(config)
    first = rank_costs(model, base, grid)
    before = tuple(stage.peak for stage in first.stages)
    ways = COMPILED if config.train.compile else WAYS
    kinds = {kind: _steps(kind, model, base, grid, first.tokens, ways) for kind in model.kinds}
    modes: list[Mode] = ["none"] * len(model.layers)
    peak = list(before)
    for rank, stage in enumerate(first.stages):
        steps = [Step(price, layer, mode) for layer in stage.layers for price, mode in kinds[model.layers[layer]]]
        steps.sort(key=lambda step: (step.price, step.layer))  # stable: the steps of one layer stay in order

        kept = tuple(modes)  # what the ranks before have chosen

        def peak_after(
            count: int, rank: int = rank, steps: Sequence[Step] = steps, kept: Sequence[Mode] = kept
        ) -> float:
            made = with_modes(model, _after(kept, steps[:count]))
            return rank_costs(made, base, grid).stages[rank].peak

        if before[rank] <= budget * GIB:
            continue
        few, many = 0, len(steps)
        peak[rank] = peak_after(many)
        if peak[rank] > budget * GIB:
            raise ConfigError(
                f"train.memory_budget = {budget:g}: with all layers computed again a step still takes "
                f"{peak[rank] / GIB:.3f} GiB by estimate; give at least {_up(peak[rank]):g}, a smaller train.micro_batch, or "
                "more ranks to share parameters"
            )
        while many - few > 1:
            middle = (few + many) // 2
            reached = peak_after(middle)
            if reached <= budget * GIB:
                many, peak[rank] = middle, reached
            else:
                few = middle
        modes = _after(modes, steps[:many])
    labels = tuple(kind.label for kind in model.layers)
    return Choice(tuple(modes), labels, tuple(peak), before)


def _up(count: float) -> float:
    """GiB, rounded up to what :g shows in full."""
    return -(-count // (GIB / 1000)) / 1000


def _after(modes: Sequence[Mode], steps: Sequence[Step]) -> list[Mode]:
    found = list(modes)
    for step in steps:
        found[step.layer] = step.mode
    return found


def again(kind: Kind, mode: Mode, model: ModelCosts, config: RunConfig, grid: Grid, tokens: int) -> tuple[float, float]:
    """(bytes that a layer of this kind keeps, FLOPs that it computes again) for a micro-batch in this way."""
    length = config.data.sequence_length
    way = Way(Cutting.of(grid), mode, config.train.precision == "bf16", config.train.device != "cpu")
    measured = kind.traced(model.width, length, way).measured(tokens)
    flops = recomputed(kind, ((length, tokens / length),), way, measured)
    return measured.inner + measured.stream + measured.state, flops


def _steps(
    kind: Kind, model: ModelCosts, config: RunConfig, grid: Grid, tokens: int, ways: Sequence[Mode]
) -> list[tuple[float, Mode]]:
    """(FLOPs for each further byte, way) along the convex curve of a kind of layer, cheapest byte first."""
    held, _ = again(kind, "none", model, config, grid, tokens)
    points: list[tuple[float, float, Mode]] = []
    for mode in ways:
        if mode in ("mixer", "ffn") and getattr(kind.block, mode) is None:
            continue
        kept, flops = again(kind, mode, model, config, grid, tokens)
        if kept < held:
            points.append((held - kept, flops, mode))
    return curve(points)


def curve(points: Sequence[tuple[float, float, Mode]]) -> list[tuple[float, Mode]]:
    """points: (bytes freed, FLOPs, way). Returns (FLOPs for each further byte, way) at the corners of their lower convex hull
    from (0, 0) to the point that frees most."""
    steps: list[tuple[float, Mode]] = []
    at = (0.0, 0.0)
    while further := [point for point in points if point[0] > at[0]]:
        # The next corner: the least FLOPs a byte from here, the farthest of equals.
        freed, again, mode = min(further, key=lambda point: ((point[1] - at[1]) / (point[0] - at[0]), -point[0]))
        steps.append(((again - at[1]) / (freed - at[0]), mode))
        at = (freed, again)
    return steps


@dataclass(eq=False)
class KindIn(Kind):
    """Layers that are alike and run in one way."""

    mode: Mode = field(default="none")

    def traced(self, width: int, length: int, way: Way) -> Traced:
        return super().traced(width, length, replace(way, recompute=self.mode))


def with_modes(model: ModelCosts, modes: Sequence[Mode]) -> ModelCosts:
    """The same model, each layer in its own way."""
    made: dict[tuple[Kind, Mode], Kind] = {}
    for kind, mode in zip(model.layers, modes, strict=True):
        if (kind, mode) not in made:
            own = {each.name: getattr(kind, each.name) for each in fields(kind)}
            made[kind, mode] = kind if mode == "none" else KindIn(**own, mode=mode)
    return replace(model, layers=tuple(made[pair] for pair in zip(model.layers, modes, strict=True)))


def costs_within(model: ModelCosts, config: RunConfig, grid: Grid, ranks_per_node: int = 8) -> RankCosts:
    """As rank_costs, for a configuration with train.memory_budget: with the layers' own ways of recomputation."""
    modes = fit(model, config, grid).modes
    base = _without(config)
    found = rank_costs(with_modes(model, modes), base, grid, ranks_per_node)
    twice = {pair: again(*pair, model, base, grid, found.tokens)[1] for pair in zip(model.layers, modes, strict=True)}
    stages = tuple(
        replace(stage, recomputed=found.micro_batches * sum(twice[model.layers[i], modes[i]] for i in stage.layers))
        for stage in found.stages
    )
    busiest = max(stages, key=lambda stage: stage.flops)
    return replace(found, stages=stages, recomputed=busiest.recomputed)


def _without(config: RunConfig) -> RunConfig:
    train = config.train.model_copy(update={"memory_budget": None, "recompute": "none"})
    return config.model_copy(update={"train": train})
