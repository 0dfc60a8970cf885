"""Gradients that are not finite, clipping, signals, saves that fail."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from pretrain.exit import NUMERICAL, Exit
from pretrain.model.stage import Stages
from pretrain.train.callback import Callback, Run
from pretrain.train.signals import Preempted, Signals
from tests.pretrain.train.small_run import checkpoint_tensors, configuration, train
from tests.ranks import TRAINING, run_ranks


class Poison(Callback):
    """Puts a NaN into one rank's forward pass on the given steps; in a pipeline into one gradient of that rank alone."""

    def __init__(self, steps: set[int], rank: int):
        self.steps, self.rank = steps, rank

    def on_start(self, run: Run) -> None:
        if run.processes.rank != self.rank:
            return
        if isinstance(run.model, Stages):
            parameter = next(run.model.parameters())
            parameter.register_hook(lambda gradient: gradient * math.nan if run.step + 1 in self.steps else gradient)
        else:
            run.model.embedding.register_forward_hook(
                lambda module, inputs, output: output * math.nan if run.step + 1 in self.steps else output
            )


def poisoned(rank: int, world: int, run: Path, corpus: Path, steps: set[int], overrides: tuple[str, ...]) -> int | str:
    try:
        return train(configuration(run, corpus, "train.precision=fp32", *overrides), [Poison(steps, world - 1)])
    except Exit as error:
        return f"{error.exit_code}"


@pytest.mark.parametrize(
    ("world", "overrides"),
    [(1, ()), (2, ()), (2, ("engine.kind=deepspeed",)), (2, ("mesh.pp=2",))],
    ids=["one", "fsdp2", "zero2", "pipeline"],
)
def test_a_step_with_nan_on_one_rank_is_skipped_by_all(
    world: int, overrides: tuple[str, ...], corpus: Path, tmp_path: Path
) -> None:
    arguments = ("train.steps=4", "checkpoint.every=1", "checkpoint.keep=10", *overrides)
    assert run_ranks(poisoned, world, tmp_path, corpus, {3}, arguments, preload=TRAINING) == [0] * world
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (records[2]["loss"] is None) == ("mesh.pp=2" not in overrides) and records[2]["grad_norm"] is None
    assert records[3]["loss"] is not None
    before, after, later = (checkpoint_tensors(tmp_path / f"checkpoints/step_0000000{step}") for step in (2, 3, 4))
    weights = [name for name in before if name.startswith("model/") and not name.endswith("router.bias")]
    assert all(torch.equal(before[name], after[name]) for name in weights)
    assert not all(torch.equal(after[name], later[name]) for name in weights)


def test_persistent_nan_ends_with_79_and_keeps_the_checkpoint(corpus: Path, tmp_path: Path) -> None:
    arguments = ("train.steps=50", "checkpoint.every=2", "train.bad_steps=3")
    assert run_ranks(poisoned, 1, tmp_path, corpus, set(range(4, 60)), arguments, preload=TRAINING) == [str(NUMERICAL)]
    records = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(records) == 5  # three good steps and two skipped ones; the sixth ended the run
    tensors = checkpoint_tensors(tmp_path / "checkpoints/step_00000002")
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())


def clipped(rank: int, world: int, run: Path, corpus: Path, clip: str) -> int:
    return train(
        configuration(run, corpus, "train.steps=2", "train.precision=fp32", f"train.clip={clip}", "optimizer.eps=1")
    )


def test_clipping_limits_the_update_and_reports_the_norm_before_it(corpus: Path, tmp_path: Path) -> None:
    """With a large eps an AdamW update is proportional to the gradient, so a clip to half the norm halves the update."""
    run_ranks(clipped, 1, tmp_path / "free", corpus, "null", preload=TRAINING)
    norm = json.loads((tmp_path / "free/metrics.jsonl").read_text().splitlines()[0])["grad_norm"]
    run_ranks(clipped, 1, tmp_path / "half", corpus, str(norm / 2), preload=TRAINING)
    moments = [checkpoint_tensors(tmp_path / name / "checkpoints/step_00000002") for name in ("free", "half")]
    first = json.loads((tmp_path / "half/metrics.jsonl").read_text().splitlines()[0])
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-6)
    total = [
        math.sqrt(sum(float(t.square().sum()) for n, t in tensors.items() if n.endswith("exp_avg")))
        for tensors in moments
    ]
    assert total[1] / total[0] == pytest.approx(0.5, rel=0.1)


def test_first_signal_is_noted_once_there_is_state_and_a_later_one_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    with Signals() as signals:
        with pytest.raises(Preempted) as early:  # nothing trained yet: leave at once
            os.kill(os.getpid(), signal.SIGTERM)
        assert early.value.code == 75
        signals.armed = True
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == "SIGUSR1"
        monkeypatch.setattr("pretrain.train.signals.REPEAT", math.inf)
        os.kill(os.getpid(), signal.SIGTERM)  # within REPEAT: the same request by another way
        assert signals.received == "SIGUSR1"
        monkeypatch.setattr("pretrain.train.signals.REPEAT", 0.0)
        with pytest.raises(Preempted):
            os.kill(os.getpid(), signal.SIGTERM)


def failing_saves(rank: int, world: int, run: Path, corpus: Path, failures: int) -> list[str]:
    from pretrain.checkpoint import points
    from pretrain.checkpoint.errors import CheckpointError

    seen: list[str] = []

    def observe(point: str) -> None:
        if point == "writing":
            seen.append(point)
            if rank == world - 1 and len(seen) <= failures:
                raise OSError(28, "No space left on device")

    points.observer = observe
    try:
        train(configuration(run, corpus, "checkpoint.every=1", "train.steps=5"))
    except CheckpointError as error:
        return [str(error)]
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_training_goes_on_after_a_failed_save(corpus: Path, tmp_path: Path) -> None:
    left = run_ranks(failing_saves, 2, tmp_path, corpus, 2, preload=TRAINING)
    assert (
        left == [["latest", "step_00000003", "step_00000004", "step_00000005"]] * 2
        or left == [["latest", "step_00000004", "step_00000005"]] * 2
    )


def test_a_run_that_cannot_save_ends_with_the_reason_on_every_rank(corpus: Path, tmp_path: Path) -> None:
    texts = run_ranks(failing_saves, 2, tmp_path, corpus, 100, preload=TRAINING)
    assert all("No space left on device" in text and "rank 1" in text for (text,) in texts)
    assert list((tmp_path / "checkpoints").iterdir()) == []
