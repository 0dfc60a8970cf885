"""The gate itself: one rank's training beside every layout's."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from parallel.engines import TorchConfig
from parallel.mesh import MeshConfig
from parallel.processes import Processes
from pretrain.config import RunConfig, TrainConfig
from pretrain.data.config import DataConfig
from pretrain.equivalence.compare import DOUBLE, SINGLE, Verdict, compare, idle
from pretrain.equivalence.layouts import name
from pretrain.equivalence.training import Outcome, joined, rows, run
from pretrain.model.decoder import DecoderConfig

# A large eps, so that rounding in a tiny gradient is not blown up to a whole step.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-2, "eps": 1e-3},
    "muon": {"lr": 1e-2, "eps": 1e-3, "precision": "fp32", "bucket_bytes": 8192},  # a few rounds
    "lamb": {"lr": 1e-2, "eps": 1e-3},
    "sgd": {"lr": 1.0, "nesterov": True, "weight_decay": 0.1},
}


def short_run(
    model: DecoderConfig,
    world: int,
    engine: dict[str, Any] | None = None,
    steps: int = 2,
    length: int = 64,
    optimizer: str = "adamw",
) -> RunConfig:
    """A few fp32 steps of a model on `world` ranks, of rows of `length` tokens. optimizer: its kind."""
    return RunConfig(
        run=Path("runs/none"),
        model=model,
        data=DataConfig(path=Path("none"), sequence_length=length),
        # Two micro-batches or more on every rank and through every pipeline, and clipping that acts.
        train=TrainConfig(steps=steps, batch=2 * world, precision="fp32", clip=0.1),
        optimizer={"kind": optimizer, **OPTIMIZERS[optimizer]},
        engine=engine or {"kind": "torch"},
    )


class Gate:
    """Compares trainings on layouts with training on one rank, which it keeps. All ranks of the job make the same calls."""

    def __init__(self, config: RunConfig, job: Processes):
        assert config.model.vocabulary is not None
        self.config, self.job = config, job
        self.batches = rows(
            config.train.steps, config.train.batch, config.data.sequence_length, config.model.vocabulary
        )
        self._alone: dict[tuple[int, torch.dtype], Outcome] = {}

    def alone(self, dp: int, dtype: torch.dtype = torch.float32) -> Outcome:
        """What one rank computes, with the micro-batches of dp ranks."""
        if (dp, dtype) not in self._alone:
            single = self.config.model_copy(update={"mesh": MeshConfig(), "engine": TorchConfig()})
            this = Processes(0, 1, self.job.local_rank, self.job.device)
            self._alone[dp, dtype] = run(single, this, joined(self.batches, dp), dtype)
        return self._alone[dp, dtype]

    def judge(self, mesh: MeshConfig) -> Verdict | None:
        """The verdict on a layout, on the job's first rank; elsewhere None. Collective."""
        verdict = self.compare(mesh, torch.float32)
        settles = isinstance(self.config.engine, TorchConfig)  # DeepSpeed keeps fp32 whatever the parameters are
        if settles and self.job.broadcast(verdict is not None and verdict.doubtful):
            double = self.compare(mesh, torch.float64)
            verdict = None if verdict is None else verdict._replace(double=double)
        return verdict

    def compare(self, mesh: MeshConfig, dtype: torch.dtype) -> Verdict | None:
        """As judge, of one precision."""
        dp = mesh.grid(self.job.world).dp
        if self.job.first:
            self.alone(dp, dtype)
        found = run(self.config.model_copy(update={"mesh": mesh}), self.job, self.batches, dtype)
        limits = SINGLE if dtype == torch.float32 else DOUBLE
        return compare(found, self.alone(dp, dtype), limits) if self.job.first else None


def judge(
    config: RunConfig, meshes: list[MeshConfig], job: Processes, say: Callable[[str], None] = lambda text: None
) -> dict[str, Verdict]:
    """Verdicts by the layouts' names on the job's first rank, where `say` is told of each; elsewhere nothing. Collective."""
    gate, verdicts = Gate(config, job), {}
    for number, mesh in enumerate(meshes):
        start, called = time.perf_counter(), name(mesh, job.world)
        verdict = gate.judge(mesh)
        if verdict is not None:
            verdicts[called] = verdict
            said = "equal" if verdict.agrees else "DIFFERS: " + "; ".join(verdict.faults())
            say(f"{number + 1}/{len(meshes)} {called}: {said} ({time.perf_counter() - start:.1f} s)")
    if job.first and meshes and (silent := idle(gate.alone(meshes[0].grid(job.world).dp))):
        say(f"no gradient on one rank, so not judged: {', '.join(silent)}")
    return verdicts
