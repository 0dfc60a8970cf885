"""What a step costs one rank of a job: arithmetic on the model's counts, for any layout and any number of ranks."""

from __future__ import annotations

from parallel.grid import Grid
from pretrain.config import RunConfig
from pretrain.estimate.costs import Collective, Matmul, RankCosts, StageCosts
from pretrain.estimate.flops import mean_context
from pretrain.estimate.model import ModelCosts

__all__ = ["Collective", "Matmul", "RankCosts", "StageCosts", "rank_costs"]


def rank_costs(model: ModelCosts, config: RunConfig, grid: Grid, ranks_per_node: int = 8) -> RankCosts:
    """The costs of a step of `config` on `grid`. Sizes must fit (pretrain/train/layout.py checks that); nothing is checked here."""
    length = config.data.sequence_length
    tokens = config.train.micro_batch * length // grid.cp
    micro_batches = config.train.batch // (grid.dp * config.train.micro_batch)
    flops = 3.0 * model.flops_per_token(mean_context([length])) * tokens * micro_batches / (grid.tp * grid.pp)
    held = model.parameters // (grid.tp * grid.pp)
    shard = grid.size("shard_cp")
    ranks = grid.size("shard_cp")
    gather = Collective(
        "shard_cp", "all_gather", "parameters", 4.0 * held, 1.0, ranks, min(ranks, ranks_per_node), True
    )
    scatter = Collective(
        "shard_cp", "reduce_scatter", "gradients", 4.0 * held, 1.0, ranks, min(ranks, ranks_per_node), True
    )
    each = 4.0 * held / shard
    collectives = (gather, scatter) if ranks > 1 else ()
    stage = StageCosts(
        tuple(range(len(model.layers))),
        held // shard,
        each,
        each,
        2 * each,
        0.0,
        0.0,
        4 * each,
        flops,
        0.0,
        (),
        collectives,
    )
    bubble = (grid.pp - 1) / (micro_batches + grid.pp - 1)
    return RankCosts(
        held // shard, each, each, 2 * each, 0.0, 0.0, 4 * each, flops, 0.0, (), collectives, bubble, (stage,) * grid.pp,
        micro_batches, tokens,
    )  # fmt: skip
