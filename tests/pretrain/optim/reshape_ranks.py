"""What the ranks of the reshaping test run: a step with an optimizer, a checkpoint, another step on another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.mesh import Mesh, MeshConfig
from parallel.processes import Processes
from parallel.whole import assemble
from pretrain.checkpoint.lifecycle import Checkpoints
from pretrain.equivalence.training import rows
from pretrain.model.decoder import Decoder
from pretrain.train.build import engine_for
from tests.pretrain.optim.layout_ranks import short


def run(
    rank: int, world: int, optimizer: str, sizes: dict[str, Any], resume: str | None, steps: list[int], save: str | None
) -> dict[str, Tensor]:
    """Takes these steps of a run of four rows a step, from a checkpoint or the beginning; whole state on the first rank."""
    config = short("GLA", 2, optimizer).model_copy(update={"mesh": MeshConfig.model_validate(sizes)})
    job = Processes(rank, world, rank, torch.device("cpu"))
    mesh = Mesh(config.mesh, job)
    torch.manual_seed(7 if resume else 0)  # what is loaded must not have been there already
    engine = engine_for(config, mesh, Decoder(config.model))
    batches = rows(2, 4, 32, 64)
    if resume is not None:
        tensors = engine.state_tensors()
        assert Checkpoints(Path(resume)).resume(tensors) is not None
        engine.load_state_tensors(tensors)
    for step in steps:
        scored = float(sum(row.scored for row in batches[step]))
        mine = batches[step][mesh.dp_rank :: mesh.dp_size]
        engine.forward_backward(mine, scored)
        engine.step(config.optimizer.lr)
    if save is not None:
        Checkpoints(Path(save)).save(1, engine.state_tensors(), {"step": 1})
    return {name: whole.tensor for name, whole in assemble(engine.state_tensors().items(), job).items()}
