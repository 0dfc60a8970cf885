"""One rank of one of the three runs. Started by ranks.py; by hand only to look into a fault."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from parallel.ending import end
from pretrain import config as configuration
from pretrain.checkpoint.folder import checkpoint_name
from pretrain.checkpoint.lifecycle import Checkpoints
from pretrain.exit import Exit
from pretrain.options import exit_code
from pretrain.train.callback import Callback, Run
from pretrain.train.loop import train
from pretrain.train.save import FOLDER, random_state


@dataclass(frozen=True)
class Task:
    """config: a resolved run file. kill_after: the step whose checkpoint must be committed before this rank kills itself, two
    steps later. arrival: a folder for a checkpoint of the state with which the first step is begun."""

    config: Path
    kill_after: int | None = None
    arrival: Path | None = None

    def arguments(self) -> list[str]:
        return [
            str(self.config),
            *([] if self.kill_after is None else ["--kill-after", str(self.kill_after)]),
            *([] if self.arrival is None else ["--arrival", str(self.arrival)]),
        ]


class Draw(Callback):
    """Draws random numbers at every step: a stream that was not restored shows even if the model itself draws none."""

    def on_step(self, run: Run) -> None:
        torch.rand((), device="cpu")
        torch.rand((), device=run.processes.device)


class Kill(Callback):
    """Ends this rank by SIGKILL: no handler, no last words, no flush.

    Two steps after the checkpoint, so that one step more is in the metrics and in the data's position, and must be done again.
    """

    def __init__(self, saved: int):
        self.saved = saved

    def on_step(self, run: Run) -> None:
        if run.step < self.saved + 2:
            return
        committed = run.folder / FOLDER / checkpoint_name(self.saved)
        patience = time.monotonic() + run.config.train.timeout
        while not committed.exists():  # a save beside training may still be under way
            if time.monotonic() > patience:
                raise Exit(f"{committed} was not committed within {run.config.train.timeout:.0f} s")
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


class Arrival(Callback):
    """Saves the state as it is before the first step: what resuming has really brought back."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_start(self, run: Run) -> None:
        meta = {"step": run.step, "tokens": run.tokens, "faults": run.faults.to_meta()}
        Checkpoints(self.folder).save(run.step, run.engine.state_tensors(), meta, random_state(run.processes.device))


def work(task: Task) -> int:
    """Trains as the task says; returns the exit code."""
    extra: list[Callback] = [Draw()]
    if task.kill_after is not None:
        extra.append(Kill(task.kill_after))
    if task.arrival is not None:
        extra.append(Arrival(task.arrival))
    return train(configuration.load(task.config), extra)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain.verify_resume.worker", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--kill-after", type=int)
    parser.add_argument("--arrival", type=Path)
    arguments = parser.parse_args(argv)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the command that started it
    try:
        return work(Task(arguments.config, arguments.kill_after, arguments.arrival))
    except Exception as error:
        return exit_code(error)


if __name__ == "__main__":
    end(main)
