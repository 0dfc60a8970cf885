"""What the ranks of the layout tests run: the equivalence gate with an optimizer."""

from __future__ import annotations

from typing import Any

import torch

from parallel.mesh import MeshConfig
from parallel.processes import Processes
from pretrain.config import RunConfig
from pretrain.equivalence.gate import judge, short_run
from tests.pretrain.equivalence_models import config

Found = dict[str, tuple[bool, list[str], float]]


def short(model: str, world: int, optimizer: str, **changes: Any) -> RunConfig:
    run = short_run(config(model), world, length=32, optimizer=optimizer)
    return run.model_copy(update={"optimizer": run.optimizer.model_copy(update=changes)})


def verdicts(
    rank: int, world: int, wanted: list[tuple[str, str, dict[str, Any], list[MeshConfig]]]
) -> dict[tuple[str, str], Found]:
    """By model, optimizer and layout: whether it trains as one rank, in what it does not, the largest difference of updates in
    fp32. Empty but on the first rank."""
    job = Processes(rank, world, rank, torch.device("cpu"))
    found: dict[tuple[str, str], Found] = {}
    for model, optimizer, changes, meshes in wanted:
        answer = judge(short(model, world, optimizer, **changes), meshes, job)
        found.setdefault((model, optimizer), {}).update(
            (layout, (verdict.agrees, verdict.faults(), verdict.update.error)) for layout, verdict in answer.items()
        )
    return found
