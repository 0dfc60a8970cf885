"""The gate itself: one rank's training beside every layout's."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parallel.engines import TorchConfig
from parallel.mesh import MeshConfig
from parallel.processes import Processes
from pretrain.config import RunConfig, TrainConfig
from pretrain.data.config import DataConfig
from pretrain.equivalence.compare import Verdict, compare, idle
from pretrain.equivalence.layouts import name
from pretrain.equivalence.training import Outcome, joined, rows, run
from pretrain.model.decoder import DecoderConfig
from pretrain.optim.adamw import AdamWConfig


def short_run(
    model: DecoderConfig, world: int, engine: dict[str, Any] | None = None, steps: int = 2, length: int = 64
) -> RunConfig:
    """A few fp32 steps of a model on `world` ranks, of rows of `length` tokens."""
    return RunConfig(
        run=Path("runs/none"),
        model=model,
        data=DataConfig(path=Path("none"), sequence_length=length),
        # Two micro-batches or more on every rank and through every pipeline, and clipping that acts.
        train=TrainConfig(steps=steps, batch=2 * world, precision="fp32", clip=0.1),
        # A large eps, so that rounding in a tiny gradient is not blown up to a whole step.
        optimizer=AdamWConfig(lr=1e-2, eps=1e-3),
        engine=engine or {"kind": "torch"},
    )


def judge(
    config: RunConfig,
    meshes: list[MeshConfig],
    job: Processes,
    say: Callable[[str], None] = lambda text: None,
    alone: dict[int, Outcome] | None = None,
) -> dict[str, Verdict]:
    """Trains on every layout, and on the first rank compares with that rank alone; elsewhere the answer is empty. Collective.

    say: is told of each layout on the first rank. alone: what one rank computed, by the rows in a micro-batch: taken from there,
    or put there.
    """
    assert config.model.vocabulary is not None
    batches = rows(config.train.steps, config.train.batch, config.data.sequence_length, config.model.vocabulary)
    single = config.model_copy(update={"mesh": MeshConfig(), "engine": TorchConfig()})
    alone = {} if alone is None else alone
    verdicts: dict[str, Verdict] = {}
    for number, mesh in enumerate(meshes):
        start = time.perf_counter()
        called, dp = name(mesh, job.world), mesh.grid(job.world).dp
        if job.first and dp not in alone:
            alone[dp] = run(single, Processes(0, 1, job.local_rank, job.device), joined(batches, dp))
            if len(alone) == 1 and (silent := idle(alone[dp])):
                say(f"no gradient on one rank, so not judged: {', '.join(silent)}")
        found = run(config.model_copy(update={"mesh": mesh}), job, batches)
        if job.first:
            verdict = verdicts[called] = compare(found, alone[dp])
            said = "equal" if verdict.agrees else "DIFFERS: " + "; ".join(verdict.faults())
            say(f"{number + 1}/{len(meshes)} {called}: {said} ({time.perf_counter() - start:.1f} s)")
    return verdicts
