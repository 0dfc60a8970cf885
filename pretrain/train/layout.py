"""From a whole model to this rank's part of it, and whether that is possible: asked before any process group forms."""

from __future__ import annotations

from parallel.context import apply_context, check_context
from parallel.expert import apply_experts, check_experts, share_loads
from parallel.grid import Grid
from parallel.mesh import Mesh
from parallel.recompute import apply_compile, apply_recompute
from parallel.tensor import apply_tensor, check_tensor
from pretrain.config import ConfigError, RunConfig
from pretrain.model.decoder import Decoder
from pretrain.model.files import empty


def check(config: RunConfig, world: int) -> Grid:
    """The process grid for `world` ranks. Needs no processes and no memory.

    Raises ConfigError, naming the setting and the valid choices, where the sizes do not fit each other, the ranks, or the model.
    """
    try:
        grid = config.mesh.grid(world)
        _check_engine(config, grid)
        vocabulary = config.model.vocabulary or 64 * grid.tp  # what the tokenizer's size is rounded to fits as well
        model = empty(config.model.model_copy(update={"vocabulary": vocabulary}))
        length = config.data.sequence_length * config.train.micro_batch
        check_tensor(model, grid.tp, length, grid.cp)
        check_experts(model, grid.ep, grid.tp, grid.expert_tensor)
        check_context(model, grid.cp, length)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return grid


def _check_engine(config: RunConfig, grid: Grid) -> None:
    if config.engine.kind == "deepspeed":
        for axis in ("pp", "cp", "tp", "ep"):
            if (size := getattr(grid, axis)) > 1:
                raise ConfigError(
                    f"mesh.{axis}={size}: the deepspeed engine keeps flat partitions over all ranks, which have no place "
                    f"for parameters that only some ranks hold; use engine.kind=torch, or mesh.{axis}=1"
                )
        if grid.replicate > 1:
            raise ConfigError(
                f"mesh.replicate={grid.replicate}: the deepspeed engine shards over all ranks; leave it out"
            )
    if grid.pp > 1:
        raise ConfigError(f"mesh.pp={grid.pp}: pipelines are not part of a training run yet; use mesh.pp=1")
    if grid.cp > 1 and config.model.multi_token is not None and grid.tp > 1:
        raise ConfigError(
            "mesh.cp and mesh.tp together do not go with model.multi_token yet; leave one of the three out"
        )


def apply(model: Decoder, config: RunConfig, mesh: Mesh) -> None:
    """Cuts a whole model, the same on all ranks, down to this rank's part; then recomputation and compilation of its blocks."""
    apply_tensor(model, mesh)
    apply_experts(model, mesh)
    apply_context(model, mesh, config.mesh.context)
    share_loads(model, mesh)
    apply_recompute(model.blocks, config.train.recompute)
    if config.train.compile:
        apply_compile(model.blocks)
