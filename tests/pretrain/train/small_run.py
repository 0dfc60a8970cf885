"""Training runs small enough for tests: the configuration, and what rank functions and assertions share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from pretrain.config import RunConfig, load
from pretrain.train import loop
from pretrain.train.callback import Callback, Run
from pretrain.train.plot import LossCurve

SETTINGS = [
    "model.width=32",
    "model.mixers={gdn: {kind: gated_delta_net, heads: 2, head_dim: 8}, attention: {kind: attention, heads: 2}}",
    "model.ffns={moe: {kind: moe, experts: 4, top_k: 2, hidden: 16}, hourglass: {kind: hourglass, hidden: 16, depth: 2}}",
    "model.layers=[gdn + moe, attention + hourglass]",
    "data.sequence_length=32",
    "train.batch=4",
    "train.micro_batch=1",
    "train.steps=6",
    "train.device=cpu",
    "optimizer.lr=5e-3",
    "schedule={kind: cosine, warmup: 2}",
    "checkpoint.every=3",
    "validation.every=null",
    "log.tensorboard=false",
]


def configuration(run: Path, corpus: Path, *overrides: str) -> RunConfig:
    return load("configs/runs/quickstart.yaml", [*SETTINGS, f"run={run}", f"data.path={corpus}", *overrides])


class StopAfter(Callback):
    """Ends a run after a step, as a signal would."""

    def __init__(self, step: int):
        self.step = step

    def on_step(self, run: Run) -> None:
        if run.step == self.step:
            run.stop = "preempted"


@contextmanager
def quick() -> Iterator[None]:
    """Runs without the loss curve and without measuring the machine, which take longer than all the steps. That a run does
    both is shown once, in tests/pretrain/test_main.py.
    """
    with (
        patch.object(LossCurve, "on_end", lambda self, run: None),
        patch.object(loop, "_peaks", lambda run: (None, 1e18, None)),
    ):
        yield


def train(config: RunConfig, extra: Sequence[Callback] = ()) -> int:
    with quick():
        return loop.train(config, extra)


def train_on_rank(
    rank: int, world: int, run: Path, corpus: Path, overrides: tuple[str, ...], stop: int | None = None
) -> int:
    return train(configuration(run, corpus, *overrides), [StopAfter(stop)] if stop is not None else [])


def records(run: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run)]


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read on one process."""
    from pretrain.checkpoint.storage import contents, read

    tensors: dict[str, Any] = {
        name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in contents(folder).items()
    }
    read(folder, tensors)
    return tensors
