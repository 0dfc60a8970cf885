"""No memory for the copy that a save beside training needs: saves go on without it, on all ranks, and say so once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.snapshot import Snapshots
from tests.faults.kills import quiet, started_again
from tests.pretrain.train.small_run import checkpoint_tensors, configuration, train
from tests.ranks import TRAINING, run_ranks

SETTINGS = ("train.steps=6", "checkpoint.every=2", "checkpoint.keep=10")


def short_of_memory(rank: int, world: int, run: Path, corpus: Path) -> int:
    """The last rank fails in the middle of its copy, as torch does; the copies of the others must not be used."""
    quiet(run / f"rank{rank}")
    copy, copied = Snapshots._copy, []

    def fail(self: Snapshots, *arguments: object) -> torch.Tensor:
        copied.append(arguments)
        if rank == world - 1 and len(copied) > 5:
            torch.empty(1 << 60)
        return copy(self, *arguments)  # type: ignore[arg-type]

    Snapshots._copy = fail  # type: ignore[method-assign]
    return train(configuration(run, corpus, *SETTINGS))


@pytest.mark.parametrize("world", [1, 2])
def test_saves_go_on_without_a_copy(world: int, corpus: Path, tmp_path: Path) -> None:
    short, usual = tmp_path / "short", tmp_path / "usual"
    assert run_ranks(short_of_memory, world, short, corpus, preload=TRAINING) == [0] * world
    assert run_ranks(started_again, world, usual, corpus, SETTINGS, preload=TRAINING) == [0] * world
    for step in (2, 4, 6):
        a, b = (checkpoint_tensors(run / f"checkpoints/step_{step:08d}") for run in (short, usual))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), step
    said = (short / "rank0/printed.txt").read_text()
    lines = [line for line in said.splitlines() if "no memory for" in line]
    assert len(lines) == 1 and lines[0].endswith("from now on training stops for every save"), said
    assert lines[0].startswith(f"step 2: copying the state to host memory: rank {world - 1}: no memory for") or (
        world == 1 and lines[0].startswith("step 2: copying the state to host memory: no memory for")
    )
    assert "GiB" in lines[0] and "allocate" in lines[0]
