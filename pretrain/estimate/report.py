"""What a run would cost, without building it: the answer of --dry-run."""

from __future__ import annotations

import os

import torch

from parallel.drawing import line
from parallel.grid import Grid
from pretrain.config import ConfigError, RunConfig
from pretrain.data.store import Corpus
from pretrain.estimate.flops import mean_context, training_flops_per_token
from pretrain.model.decoder import Decoder
from pretrain.model.ffns.routed import RoutedFFN
from pretrain.train.build import build_model, or_usage, with_vocabulary
from pretrain.train.layout import check_batch
from pretrain.train.progress import human

GIB = 2**30


def report(config: RunConfig) -> str:
    """Parameters, FLOPs and bytes of a run on as many ranks as its mesh asks for.

    Without mesh.dp: on those of the environment (WORLD_SIZE), or the fewest that the mesh allows.
    """
    if config.model.vocabulary is None:
        try:
            config = with_vocabulary(
                config, Corpus.open(config.data.path, tokenizer=config.data.tokenizer).vocabulary_size
            )
        except Exception as error:
            raise ConfigError(f"{error} (or set model.vocabulary to estimate without data)") from None
    with torch.device("meta"):
        model = build_model(config)
    world = int(os.environ.get("WORLD_SIZE", 0)) or None
    grid = or_usage(lambda: config.mesh.grid(world if config.mesh.dp is None else None))
    check_batch(config, grid)
    return "\n".join(f"{name:<22}{value}" for name, value in _rows(config, model, grid))


def _rows(config: RunConfig, model: Decoder, grid: Grid) -> list[tuple[str, str]]:
    total = sum(parameter.numel() for parameter in model.parameters())
    length = config.data.sequence_length
    tokens = config.train.batch * length
    per_token = training_flops_per_token(model, mean_context([length]))
    sharded = _sharded_bytes(config, model, grid)
    return [
        ("layers", f"{len(model.blocks)}: {', '.join(str(layer) for layer in config.model.pattern())}"),
        ("parameters", f"{human(total)}, {human(model.active_parameters())} active per token"),
        ("vocabulary", f"{model.embedding.num_embeddings}"),
        ("ranks", f"{grid.world}, {config.engine.kind} engine" + (f": {line(grid)}" if grid.world > grid.dp else "")),
        ("tokens a step", f"{human(tokens)} ({config.train.batch} sequences of {length})"),
        ("tokens in all", human(tokens * config.train.steps)),
        ("FLOPs a token", f"{human(per_token)} (forward and backward)"),
        ("FLOPs in all", human(per_token * tokens * config.train.steps)),
        (
            "memory a rank",
            f"{sharded / GIB:.3f} GiB for parameters, gradients and optimizer state (activations not counted)",
        ),
    ]


def _sharded_bytes(config: RunConfig, model: Decoder, grid: Grid) -> float:
    """Bytes a rank for fp32 parameters (4), gradients (4) and two AdamW moments (8), as the engine spreads them.

    Counts every matrix as cut evenly over tp and the layers over pp; what stays whole (norms, routers) is small.
    """
    routed = sum(m.gate_up.numel() + m.down.numel() for m in model.modules() if isinstance(m, RoutedFFN))
    other = sum(parameter.numel() for parameter in model.parameters()) - routed
    # Of each kind: what a rank and those that hold the same have between them, and over how many it is sharded.
    held = other / (grid.pp * grid.tp), grid.size("shard_cp")
    held_experts = routed / (grid.pp * grid.ep * (grid.tp if grid.expert_tensor else 1)), grid.size("edp")
    return sum(_bytes(config, grid, parameters, ranks) for parameters, ranks in (held, held_experts))


def _bytes(config: RunConfig, grid: Grid, parameters: float, ranks: int) -> float:
    """Bytes a rank for `parameters` that `ranks` ranks shard."""
    if config.engine.kind == "torch":
        accumulates = (
            config.train.batch > grid.dp * config.train.micro_batch and not config.engine.reduce_each_micro_batch
        )
        gradients = 4.0 if accumulates and ranks > 1 else 4.0 / ranks  # whole ones stay until the last micro-batch
        return parameters * (12.0 / ranks + gradients)
    # Up to stage 2, ZeRO keeps whole parameters on every rank, besides its share of the fp32 copy and of the moments.
    gradients = 4.0 if config.engine.stage == 1 else 4.0 / ranks
    whole = 4.0 if config.engine.stage < 3 else 4.0 / ranks
    state = 12.0 / ranks
    if (
        config.engine.offload != "none"
    ):  # then these are in the host's memory, and so are the gradients that wait for them
        gradients = state = 0.0
    return parameters * ((0.0 if config.engine.offload == "parameters" else whole) + gradients + state)
