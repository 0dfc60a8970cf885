"""From a whole model to this rank's part of it, and whether that is possible: asked before any process group forms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parallel.compilation import apply_compile
from parallel.context import apply_context, check_context
from parallel.expert import apply_experts, check_experts, share_loads
from parallel.grid import Grid
from parallel.mesh import Mesh
from parallel.recompute import Mode, apply_recompute
from parallel.tensor import apply_tensor, check_tensor
from pretrain.config import ConfigError, RunConfig
from pretrain.model.decoder import Decoder
from pretrain.model.files import empty

if TYPE_CHECKING:
    from parallel.pipeline.plan import Plan


def check(config: RunConfig, world: int) -> Grid:
    """The process grid for `world` ranks. Needs no processes and no memory.

    Raises ConfigError, naming the setting and the valid choices, where the sizes do not fit each other, the ranks, or the model.
    """
    try:
        grid = config.mesh.grid(world)
        check_batch(config, grid)
        vocabulary = config.model.vocabulary or 64 * grid.tp  # what the tokenizer's size is rounded to fits as well
        check_model(config, grid, empty(config.model.model_copy(update={"vocabulary": vocabulary})))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return grid


def check_model(config: RunConfig, grid: Grid, model: Decoder) -> None:
    """What `check` asks after the batch. model: the whole one, on the meta device perhaps. Raises ValueError."""
    check_engine(config, grid)
    if grid.pp > 1:
        check_pipeline(config, model, grid)
    check_cuts(config, grid, model)
    describe_memory(config, grid)


def describe_memory(config: RunConfig, grid: Grid) -> list[str]:
    """For people: what train.memory_budget leads to. Raises ConfigError where it is too small."""
    budget = config.train.memory_budget
    if budget is None:
        return []
    if config.train.recompute != "none":
        raise ConfigError(
            f"train.memory_budget chooses what is computed again in place of train.recompute={config.train.recompute}; "
            "leave one of them out"
        )
    if config.model.vocabulary is None:
        return []  # known when the data has been opened
    from pretrain.estimate.budget import choose

    return choose(config, grid).lines(budget)


def check_cuts(config: RunConfig, grid: Grid, model: Decoder) -> None:
    """Whether the model can be cut over tp, ep and cp. Raises ValueError."""
    length = config.data.sequence_length * config.train.micro_batch
    check_tensor(model, grid.tp, length, grid.cp)
    check_experts(model, grid.ep, grid.tp, grid.expert_tensor)
    check_context(model, grid.cp, length)


def check_engine(config: RunConfig, grid: Grid) -> None:
    config.optimizer.check(config.engine.kind)
    if config.engine.kind == "deepspeed":
        config.engine.check(grid, config.train.compile)


def check_batch(config: RunConfig, grid: Grid) -> None:
    """Raises ConfigError unless a step's sequences go evenly into micro-batches on all data-parallel ranks."""
    batch, unit = config.train.batch, grid.dp * config.train.micro_batch
    if batch % unit:
        near = sorted({max(unit, batch // unit * unit), (batch // unit + 1) * unit})
        choices = [f"train.batch={' or '.join(map(str, near))}", "another train.micro_batch"]
        if batch % config.train.micro_batch == 0:  # then there are numbers of ranks that fit: a job may have lost some
            micro_batches = batch // config.train.micro_batch
            fit = [str(ranks) for ranks in range(1, micro_batches + 1) if micro_batches % ranks == 0]
            choices.append(f"{' or '.join([', '.join(fit[:-1]), fit[-1]] if fit[1:] else fit)} data-parallel rank(s)")
        raise ConfigError(
            f"train.batch = {batch}: not a multiple of {grid.dp} data-parallel rank(s) times train.micro_batch = "
            f"{config.train.micro_batch}; use {', or '.join(choices)}"
        )


def check_pipeline(config: RunConfig, model: Decoder, grid: Grid) -> None:
    """Whether the schedule can run these stages and micro-batches. Raises ValueError."""
    assert config.engine.kind == "torch"  # others have refused
    if config.engine.reduce_each_micro_batch:
        raise ConfigError(
            f"engine.reduce_each_micro_batch=true: a pipeline (mesh.pp={grid.pp}) reduces gradients once a step; leave it out"
        )
    if config.mesh.pp_schedule == "zbv" and config.train.compile:
        raise ConfigError(
            "mesh.pp_schedule=zbv puts weight gradients off, which compiled blocks cannot; "
            "use mesh.pp_schedule=interleaved, or train.compile=false"
        )
    plan(config, model).check(config.train.batch // (grid.dp * config.train.micro_batch))


def plan(config: RunConfig, model: Decoder) -> Plan:
    """Which layers of a whole model form which pipeline stage: as many FLOPs in each as can be.

    Raises ValueError, naming the field of the mesh section, for what does not fit.
    """
    from parallel.pipeline.plan import Plan  # which brings torch's pipelines: half a second that others need not wait

    mesh = config.mesh
    layers, before, after = model.costs(config.data.sequence_length / 2)  # keys that a token sees on average, at most
    made = Plan.of(mesh.pp_schedule, mesh.pp, layers, before, after, mesh.pp_virtual, mesh.pp_layers)
    for rank in range(made.ranks):
        held = made.held_by(rank)
        if not any(len(made.layers[stage]) or stage in (0, made.stages - 1) for stage in held):
            raise ValueError(
                f"mesh.pp_layers={mesh.pp_layers}: pipeline rank {rank} would hold stages {held}, which have no layers; "
                "give one of them a layer"
            )
    return made


def apply(model: Decoder, config: RunConfig, mesh: Mesh) -> None:
    """Cuts a whole model or a stage of one, the same on all ranks, down to this rank's part of it.

    Then compilation and recomputation of its blocks.
    """
    apply_tensor(model, mesh)
    apply_experts(model, mesh)
    apply_context(model, mesh, config.mesh.context)
    share_loads(model, mesh)
    blocks = list(model.layers())
    if config.train.compile:
        apply_compile(blocks)
    for block, mode in zip(blocks, modes(model, config, mesh.grid), strict=True):
        apply_recompute([block], mode)


def modes(model: Decoder, config: RunConfig, grid: Grid) -> list[Mode]:
    """How each layer that a decoder or a stage of one holds is recomputed."""
    if config.train.memory_budget is None:
        return [config.train.recompute for _ in model.layers()]
    from pretrain.estimate.budget import choose

    chosen = choose(config, grid).modes
    return [mode for block, mode in zip(model.blocks, chosen, strict=True) if block is not None]
