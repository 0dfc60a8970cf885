"""A power cut at any moment of a save: every disk that it could leave loads to the old state or the new, whole.

And the proof that this test can fail: each fsync left out, and each change of order, is noticed.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pretrain.checkpoint import folder as on_disk
from pretrain.checkpoint import storage
from pretrain.checkpoint.durable import write_text
from pretrain.checkpoint.errors import CheckpointError, NoLoadableCheckpoint
from pretrain.checkpoint.lifecycle import Checkpoints
from tests.faults.crash_replay import Op, Recorder, Tree, last_tree, merged, read_tree, states, write_tree
from tests.ranks import run_ranks

Record = tuple[Tree, list[Op]]
NOTHING = "nothing"


class Watched(Checkpoints):
    """Tells the recorder when a commit has returned: from then on the new checkpoint must survive anything."""

    recorder: Recorder | None = None

    def _commit(self, *arguments: Any) -> Path:
        path = super()._commit(*arguments)
        if self.recorder is not None:
            self.recorder.mark("committed")
        return path


def tensors(step: int, rank: int = 0) -> dict[str, torch.Tensor]:
    return {f"model/{rank}": torch.full((50,), float(step)), f"optimizer/{rank}": torch.full((7,), -float(step))}


def save(checkpoints: Checkpoints, step: int, rank: int = 0) -> None:
    own = {"rng": torch.full((5,), step, dtype=torch.uint8)}
    checkpoints.save(step, tensors(step, rank), {"step": step, "data": {"sequences": 4 * step}}, own)


def record(root: Path, steps: tuple[int, ...], kind: type[Watched] = Watched, before: tuple[int, ...] = ()) -> Record:
    """Saves `before`, safe on disk; then the record of saving `steps`, of which each removes the one before."""
    root.mkdir()
    for step in before:
        save(Watched(root / "run" / "checkpoints", keep=1), step)
    with Recorder(root) as recorder:
        checkpoints = kind(root / "run" / "checkpoints", keep=1)
        checkpoints.recorder = recorder
        for step in steps:
            recorder.mark("saving")
            save(checkpoints, step)
        recorder.mark("returned")
    return recorder.base, recorder.log


class Found(NamedTuple):
    """newest: what a strict resume takes: a name, NOTHING, or an error. pointer: None if there is none. fault: of any other."""

    newest: str
    pointer: str | None
    whole: list[str]
    fault: str


@cache
def find(tree: frozenset[tuple[str, bytes | None]], scratch: Path, ranks: int) -> Found:
    if scratch.exists():
        shutil.rmtree(scratch)
    write_tree(scratch, dict(tree))
    folder = scratch / "run" / "checkpoints"
    pointer = (folder / "latest").read_text(errors="replace") if (folder / "latest").exists() else None
    entries = on_disk.entries(folder)
    faults = {entry.path.name: entry.fault or mixture(entry, ranks) for entry in entries}
    whole = [name for name, fault in faults.items() if not fault]
    loaded = {name: torch.empty_like(t) for rank in range(ranks) for name, t in tensors(0, rank).items()}
    try:
        found = Checkpoints(folder, strict=True, report=lambda line: None).resume(loaded)
        newest = found.path.name if found else NOTHING
    except (NoLoadableCheckpoint, CheckpointError, ValueError) as error:
        newest = f"{type(error).__name__}: {error}"
    return Found(newest, pointer, whole, next(filter(None, faults.values()), ""))


def mixture(entry: on_disk.Entry, ranks: int) -> str:
    """What in a checkpoint is not of its step: all tensors and meta.json are looked at."""
    wanted = {name: t for rank in range(ranks) for name, t in tensors(entry.step, rank).items()}
    for rank in range(ranks):
        wanted[f"rank/{rank}/rng"] = torch.full((5,), entry.step, dtype=torch.uint8)
    found = {name: torch.empty_like(tensor) for name, tensor in wanted.items()}
    try:
        storage.read(entry.path, found)
    except (CheckpointError, ValueError) as error:
        return str(error)
    mixed = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    if mixed or entry.record["meta"] != {"step": entry.step, "data": {"sequences": 4 * entry.step}}:
        return f"a mixture: {mixed or entry.record['meta']}"
    return ""


def violations(
    base: Tree, log: list[Op], names: list[str], scratch: Path, ranks: int = 1, most: int = 40
) -> Iterator[str]:
    """What goes wrong in some state. names: of the checkpoint before the record, or NOTHING, and of each that is saved."""
    last = -1
    allowed = {"": names[:1]}  # what may be found, by phase
    for state in states(base, numbered(log), most):
        if state.phase not in allowed:
            last += state.phase.startswith("saving")
            allowed[state.phase] = (
                names[last : last + 2] if state.phase.startswith("saving") else names[last + 1 : last + 2]
            )
        newest, pointer, whole, fault = find(frozenset(state.tree.items()), scratch, ranks)
        trouble = ""
        if newest not in allowed[state.phase]:
            trouble = f"found {newest} instead of {' or '.join(allowed[state.phase])}"
        elif fault:
            trouble = f"a checkpoint that is not whole has a name: {fault}"
        elif pointer is not None and pointer.removesuffix("\n") not in whole:
            trouble = f"the pointer says {pointer!r}, there is {whole}"
        elif state.phase.startswith("returned") and pointer != f"{names[-1]}\n":
            trouble = f"the save has returned and the pointer says {pointer!r}"
        if trouble:
            yield f"{trouble} ({state.story})"


def numbered(log: list[Op]) -> list[Op]:
    """Every mark with a name of its own, in this order: saving, committed, saving, committed, ..., returned."""
    return [replace(op, path=f"{op.path} {index}") if op.kind == "mark" else op for index, op in enumerate(log)]


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(
        logging.WARNING
    )  # a dozen lines for each of a thousand loads
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="replay-", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder) / "disk"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The first save of a run: its folders are made, too."""
    return record(tmp_path_factory.mktemp("first") / "disk", (10,))


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """A save that replaces an older one."""
    return record(tmp_path_factory.mktemp("second") / "disk", (20,), before=(10,))


OLD, NEW = "step_00000010", "step_00000020"


def test_the_first_save_leaves_nothing_or_all(first: Record, scratch: Path) -> None:
    assert list(violations(*first, [NOTHING, OLD], scratch)) == []


def test_a_save_leaves_the_old_checkpoint_or_the_new(second: Record, scratch: Path) -> None:
    assert list(violations(*second, [OLD, NEW], scratch)) == []
    found = list(states(*second, 40))
    assert {find(frozenset(state.tree.items()), scratch, 1).newest for state in found} == {OLD, NEW} and len(found) > 80


def test_saves_in_a_row_and_of_one_step_twice(tmp_path: Path, scratch: Path) -> None:
    log = record(tmp_path / "disk", (20, 20, 30), before=(10,))
    assert list(violations(*log, [OLD, NEW, f"{NEW}.2", "step_00000030"], scratch)) == []
    assert sum(1 for _ in states(*log, 40)) > 400


@pytest.mark.campaign
def test_thousands_of_disks(tmp_path: Path, scratch: Path) -> None:
    log = record(tmp_path / "disk", (20, 20, 30, 40), before=(10,))
    names = [OLD, NEW, f"{NEW}.2", "step_00000030", "step_00000040"]
    assert list(violations(*log, names, scratch, most=2000)) == []


def fsyncs(log: list[Op]) -> list[int]:
    """Those that make something safe: the run's folder is fsynced in every save, but has a new name in it in the first only."""
    made = any(op.kind == "mkdir" and op.path == "run" for op in log)
    return [i for i, op in enumerate(log) if op.kind in ("fsync", "fsync folder") and (made or op.path != "run")]


@pytest.mark.parametrize("which", ["first", "second"])
def test_no_fsync_can_be_left_out(which: str, request: pytest.FixtureRequest, scratch: Path) -> None:
    base, log = request.getfixturevalue(which)
    names = [NOTHING, OLD] if which == "first" else [OLD, NEW]
    unnoticed = [
        f"{index}: {log[index]}"
        for index in fsyncs(log)
        if next(violations(base, log[:index] + log[index + 1 :], names, scratch), None) is None
    ]
    assert len(fsyncs(log)) == (10 if which == "first" else 9)
    assert unnoticed == []


class PointerFirst(Watched):
    def _commit(self, step: int, fresh: Path, *rest: Any) -> Path:
        write_text(self.folder / on_disk.LATEST, on_disk.checkpoint_name(step) + "\n")
        return super()._commit(step, fresh, *rest)


class PruneFirst(Watched):
    def _commit(self, step: int, fresh: Path, *rest: Any) -> Path:
        for entry in on_disk.entries(self.folder):
            self._remove(entry.path)
        return super()._commit(step, fresh, *rest)


class WritesInPlace(Watched):
    """No hidden folder: the files appear under the checkpoint's own name."""

    def _reserve(self, step: int, *rest: Any) -> Path:
        fresh = super()._reserve(step, *rest)
        place = self.folder / on_disk.checkpoint_name(step)
        fresh.rename(place)
        return place

    def _commit(self, *arguments: Any) -> Path:
        rename, Path.rename = Path.rename, lambda self, target: self  # type: ignore[method-assign, assignment]
        try:
            return super()._commit(*arguments)
        finally:
            Path.rename = rename  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("kind", "before", "said"),
    [
        (PointerFirst, (), "NoLoadableCheckpoint"),
        (PruneFirst, (10,), "NoLoadableCheckpoint"),
        (WritesInPlace, (10,), "NoLoadableCheckpoint"),
    ],
)
def test_a_wrong_order_is_noticed(
    kind: type[Watched], before: tuple[int, ...], said: str, tmp_path: Path, scratch: Path
) -> None:
    log = record(tmp_path / "disk", (20,), kind, before)
    found = next(violations(*log, [OLD if before else NOTHING, NEW], scratch), "")
    assert said in found


def test_bytes_that_come_after_the_names_are_noticed(second: Record, scratch: Path) -> None:
    """The rename before the data's fsync: the order in which most programs do it."""
    base, log = second
    data = next(i for i, op in enumerate(log) if op.kind == "fsync" and op.path.endswith(".data"))
    commit = next(i for i, op in enumerate(log) if op.kind == "rename" and op.target.endswith("step_00000020"))
    late = [*log[:data], *log[data + 1 : commit + 2], log[data], *log[commit + 2 :]]
    assert "found" in next(violations(base, late, [OLD, NEW], scratch))


def two_ranks(rank: int, world: int, root: Path) -> Record:
    checkpoints = Watched(root / "run" / "checkpoints", keep=1)
    save(checkpoints, 10, rank)
    with Recorder(root, alone=False) as recorder:
        checkpoints.agreement.decide("beginning together", lambda: None)
        if rank == 0:
            checkpoints.recorder = recorder
            recorder.mark("saving")
        save(checkpoints, 20, rank)
        if rank == 0:
            recorder.mark("returned")
    return recorder.base, recorder.log


def test_two_ranks_write_one_checkpoint(tmp_path: Path, scratch: Path) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    (base, log), (_, other) = run_ranks(two_ranks, 2, root)
    assert {op.path.rsplit("/")[-1] for op in other if op.kind == "write"} == {"00001.data", "00001.sums"}
    together = merged(log, other)
    assert last_tree(base, together) == read_tree(root)
    assert list(violations(base, together, [OLD, NEW], scratch, ranks=2, most=20)) == []
    for which in (index for index, op in enumerate(together) if op.kind == "fsync" and op in other):
        assert next(violations(base, together[:which] + together[which + 1 :], [OLD, NEW], scratch, ranks=2), None)


def test_a_change_out_of_sight_is_noticed(tmp_path: Path) -> None:
    """The recorder must see everything, or this file proves nothing."""
    import subprocess

    with pytest.raises(AssertionError, match="does not see"), Recorder(tmp_path):
        subprocess.run(["touch", str(tmp_path / "x")], check=True)
