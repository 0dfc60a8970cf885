"""What a step costs one rank of a job: arithmetic on the model's counts, for any layout and any number of ranks."""

from __future__ import annotations

from parallel.grid import Grid
from pretrain.config import RunConfig
from pretrain.estimate.costs import Collective, Matmul, RankCosts, StageCosts
from pretrain.estimate.model import ModelCosts, Way
from pretrain.estimate.parameters import Cutting
from pretrain.estimate.pipeline import bubble, in_flight
from pretrain.estimate.setting import Held, Setting
from pretrain.estimate.stage import costs

__all__ = ["Collective", "Matmul", "RankCosts", "StageCosts", "rank_costs"]


def rank_costs(model: ModelCosts, config: RunConfig, grid: Grid, ranks_per_node: int = 8) -> RankCosts:
    """The costs of a step of `config` on `grid`. Sizes must fit, which pretrain/train/layout.py checks.

    Memory is that of a GPU, where operators take other forms than on a CPU, unless train.device is cpu. All is arithmetic, except
    in the first call with a new cut of the layers (mesh.tp, mesh.ep, sequence length, precision, recomputation): it follows each
    kind of layer once. With train.memory_budget, those of the recomputation that fits it (budget.py).
    """
    if config.train.memory_budget is not None:
        from pretrain.estimate.budget import costs_within  # which is made of calls of this function

        return costs_within(model, config, grid, ranks_per_node)
    length = config.data.sequence_length
    assert config.optimizer == model.optimizer, "parameters know what their optimizer keeps"
    setting = Setting(
        model=model,
        config=config,
        grid=grid,
        way=Way(
            Cutting.of(grid), config.train.recompute, config.train.precision == "bf16", config.train.device != "cpu"
        ),
        tokens=config.train.micro_batch * length // grid.cp,
        micro_batches=config.train.batch // (grid.dp * config.train.micro_batch),
        ranks_per_node=ranks_per_node,
    )
    stages = _stages(setting)
    worst = max(stages, key=lambda stage: stage.peak)
    busiest = max(stages, key=lambda stage: stage.flops)
    return RankCosts(
        parameters=worst.parameters,
        weights=worst.weights,
        gradients=worst.gradients,
        optimizer=worst.optimizer,
        activations=worst.activations,
        buffers=worst.buffers,
        peak=worst.peak,
        flops=busiest.flops,
        recomputed=busiest.recomputed,
        remade=busiest.remade,
        update=max(stage.update for stage in stages),
        matmuls=busiest.matmuls,
        collectives=busiest.collectives,
        bubble=bubble(config.mesh, setting.micro_batches) if grid.pp > 1 else 0.0,
        stages=stages,
        micro_batches=setting.micro_batches,
        tokens=setting.tokens,
    )


def _stages(setting: Setting) -> tuple[StageCosts, ...]:
    layers = setting.model.layers
    if setting.grid.pp == 1:
        return (costs(setting, [Held(layers, 0, 1, 0)], [1]),)
    plan = setting.model.plan(setting.config, setting.grid)
    held = [Held(layers[own.start : own.stop], i, plan.stages, own.start) for i, own in enumerate(plan.layers)]
    return tuple(
        costs(
            setting,
            [held[i] for i in plan.held_by(rank)],
            in_flight(setting.config.mesh, rank, setting.micro_batches),
        )
        for rank in range(plan.ranks)
    )
