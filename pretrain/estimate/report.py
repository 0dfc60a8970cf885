"""What a run would cost, without building it: the answer of --dry-run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import groupby

from parallel.drawing import line
from parallel.grid import Grid
from pretrain.config import ConfigError, RunConfig
from pretrain.data.opening import vocabulary_size
from pretrain.estimate.layout import Collective, RankCosts, rank_costs
from pretrain.estimate.model import ModelCosts
from pretrain.figures import human
from pretrain.train.build import or_usage, with_vocabulary
from pretrain.train.layout import check_batch, check_model

GIB = 2**30
NAME = 22  # columns of a row's name

Row = tuple[str, str]


def report(config: RunConfig) -> str:
    """Parameters, FLOPs, bytes and messages of a run on as many ranks as its mesh asks for.

    Without mesh.dp: on those of the environment (WORLD_SIZE), or the fewest that the mesh allows. Raises ConfigError for what
    such a run would refuse.
    """
    if config.model.vocabulary is None:
        try:
            config = with_vocabulary(config, vocabulary_size(config.data))
        except Exception as error:
            raise ConfigError(f"{error} (or set model.vocabulary to estimate without data)") from None
    model = ModelCosts.of(config)
    world = int(os.environ.get("WORLD_SIZE", 0)) or None
    grid = or_usage(lambda: config.mesh.grid(world if config.mesh.dp is None else None))
    check_batch(config, grid)
    or_usage(lambda: check_model(config, grid, model.model))
    node = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or min(8, grid.world)
    costs = or_usage(lambda: rank_costs(model, config, grid, node))
    rows = [*_model(config, model), *_job(config, model, grid), *_memory(config, grid, costs), *_work(costs)]
    return "\n".join([f"{name:<{NAME}}{value}" for name, value in rows] + _messages(costs, node))


def _model(config: RunConfig, model: ModelCosts) -> Iterator[Row]:
    runs = [(name, len(list(same))) for name, same in groupby(str(layer) for layer in config.model.pattern())]
    shown = ", ".join(name if count == 1 else f"{name} x{count}" for name, count in runs)
    yield "layers", f"{len(model.layers)}: {shown}"
    yield "parameters", f"{human(model.parameters)}, {human(model.active)} active per token"
    yield "without embeddings", f"{human(model.parameters - model.embeddings)}, {human(_inner(model))} active per token"
    yield "vocabulary", f"{model.vocabulary}"


def _inner(model: ModelCosts) -> int:
    return model.active - model.embeddings


def _job(config: RunConfig, model: ModelCosts, grid: Grid) -> Iterator[Row]:
    length = config.data.sequence_length
    tokens = config.train.batch * length
    per_token = model.forward(length).training
    drawn = f": {line(grid)}" if grid.world > grid.dp else ""
    yield "ranks", f"{grid.world}, {config.engine.kind} engine{drawn}"
    yield "tokens a step", f"{human(tokens)} ({config.train.batch} sequences of {length})"
    yield "tokens in all", human(tokens * config.train.steps)
    yield "FLOPs a token", f"{human(per_token)} (forward and backward)"
    yield "FLOPs in all", human(per_token * tokens * config.train.steps)


def _memory(config: RunConfig, grid: Grid, costs: RankCosts) -> Iterator[Row]:
    worst = ""
    if grid.pp > 1:
        number = max(range(len(costs.stages)), key=lambda i: costs.stages[i].peak)
        worst = f", on pipeline rank {number}, which needs most"
    device = "a CPU" if config.train.device == "cpu" else "a GPU"
    yield "memory a rank", f"{_gib(costs.peak)} at the peak{worst}, with the operators of {device}"
    yield "  weights", f"{_gib(costs.weights)} ({human(costs.parameters)} parameters in fp32)"
    yield "  gradients", _gib(costs.gradients)
    yield "  optimizer", _gib(costs.optimizer)
    how = {"none": "no recomputation", "full": "full recomputation", "selective": "selective recomputation"}
    budget = config.train.memory_budget
    recomputed = how[config.train.recompute] if budget is None else f"recomputed to fit {budget:g} GiB"
    per = f"micro-batch of {costs.tokens} tokens, {recomputed}"
    yield "  activations", f"{_gib(costs.activations)} ({per})"
    yield "  buffers", f"{_gib(costs.buffers)} (gathered parameters and gradients on their way)"


def _work(costs: RankCosts) -> Iterator[Row]:
    again = f", and {human(costs.recomputed)} recomputed" if costs.recomputed else ""
    yield "work a rank and step", f"{human(costs.flops)} FLOPs{again}, in {costs.micro_batches} micro-batch(es)"
    if costs.bubble or len(costs.stages) > 1:
        yield "pipeline bubble", f"{100 * costs.bubble:.1f} % of a step"
        yield "layers of each stage", ", ".join(str(len(stage.layers)) for stage in costs.stages)


def _messages(costs: RankCosts, node: int) -> list[str]:
    """A table: the messages of a rank in a step, largest first within an axis."""
    if not costs.collectives:
        return []
    rows: list[tuple[str, ...]] = [("axis", "op", "of", "calls", "bytes a call", "bytes a step", "ranks")]
    axes = list(dict.fromkeys(collective.axis for collective in costs.collectives))
    for axis in axes:
        own = [collective for collective in costs.collectives if collective.axis == axis]
        for collective in sorted(own, key=lambda c: -c.total):
            rows.append(_row(collective))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = {0, 1, 2}
    lines = [
        "  " + "  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    total = sum(collective.total for collective in costs.collectives)
    head = f"{'messages of a rank':<{NAME}}{_bytes(total)} a step ({node} ranks a node; loads of experts taken as even)"
    return [head, *(text.rstrip() for text in lines)]


def _row(collective: Collective) -> tuple[str, ...]:
    ranks = str(collective.ranks)
    if collective.ranks_in_node < collective.ranks:
        ranks += f" ({collective.ranks_in_node} a node)"
    calls = f"{collective.calls:g}"
    total = _bytes(collective.total)
    return collective.axis, collective.op, collective.what, calls, _bytes(collective.bytes), total, ranks


def _gib(count: float) -> str:
    return f"{count / GIB:.3f} GiB"


def _bytes(count: float) -> str:
    """1_500_000 -> 1.50 MB, by thousands as bandwidths are."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError
