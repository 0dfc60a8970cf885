"""When a checkpoint counts, with real ranks, real files and real kills."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint import folder as on_disk
from pretrain.checkpoint import points
from pretrain.checkpoint.errors import CheckpointError, NoLoadableCheckpoint
from pretrain.checkpoint.lifecycle import Checkpoints
from tests.pretrain.checkpoint import ranks_at_work as work
from tests.ranks import Died, run_ranks


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def small(folder: Path, steps: list[int], **options: Any) -> Checkpoints:
    """One tensor, whose value is the step, saved at each of the steps by this process."""
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, {"model/w": torch.full((100,), float(step))}, {"step": step})
    return checkpoints


def value(checkpoints: Checkpoints) -> float | None:
    tensors = {"model/w": torch.zeros(100)}
    return float(tensors["model/w"][0]) if checkpoints.resume(tensors) else None


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_process_without_a_process_group(tmp_path: Path) -> None:
    model, optimizer = work.build(shard=False)
    work.train(model, optimizer, 0, 3)
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(3, work.state(model, optimizer), {"step": 3, "nan": float("nan"), "x": 0.1 + 0.2})
    assert names(tmp_path) == ["latest", "step_00000003"]
    assert (tmp_path / "latest").read_text() == "step_00000003\n"
    record = json.loads((path / "meta.json").read_text())
    assert record["files"] == {p.name: p.stat().st_size for p in path.iterdir() if p.name != "meta.json"}
    other, other_optimizer = work.build(shard=False)
    tensors = work.state(other, other_optimizer)
    checkpoints.load(path, tensors)
    assert equal(tensors, work.state(model, optimizer))
    assert checkpoints.meta(path)["x"] == 0.1 + 0.2 and str(checkpoints.meta(path)["nan"]) == "nan"


def test_no_checkpoint_is_a_fresh_start(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "absent").newest() is None
    assert Checkpoints(tmp_path).resume({}) is None


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint of step 3 by two ranks, its tensors, and the tensors of step 5 of a run that never stopped."""
    folder = tmp_path_factory.mktemp("two")
    saved = run_ranks(work.save, 2, str(folder), 3)
    return folder, saved[0][0], run_ranks(work.save, 2, str(folder / "straight"), 5)[0][0]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_fsdp_on_two_ranks_loads_bit_for_bit_on_any_number(
    two_ranks: tuple[Path, dict[str, Tensor], dict[str, Tensor]], world: int
) -> None:
    folder, saved, straight = two_ranks
    assert float(saved["optimizer/first.weight/step"]) == 3 and saved["model/count"].tolist() == [3, 3]
    for rank, (step, meta, per_rank, loaded, after, lines) in enumerate(run_ranks(work.resume, world, str(folder), 2)):
        assert (step, meta) == (3, {"step": 3, "lr": 0.1})
        assert equal(loaded, saved)
        for name, tensor in after.items():
            # Gradients are averaged over ranks: the same bits on as many ranks, rounded otherwise on others.
            torch.testing.assert_close(tensor, straight[name], rtol=0 if world == 2 else 1e-5, atol=1e-6 * (world != 2))
        if world == 2:
            assert per_rank is not None and per_rank["rng"].tolist() == [rank] and lines == []
        else:
            assert per_rank is None
            assert [("written by 2 ranks and is read by" in line) for line in lines] == [True] * (rank == 0)


# At "writing" the victim has written nothing, at "written" its shards; at "manifest" only the rename is missing.
@pytest.mark.parametrize(("victim", "at"), [(1, "writing"), (0, "written"), (0, "manifest")])
def test_kill_9_before_the_commit_leaves_the_previous_one(tmp_path: Path, victim: int, at: str) -> None:
    results = run_ranks(work.die_while_saving, 2, str(tmp_path), victim, at, may_die=[victim], timeout=30)
    assert results[victim] == Died(-9) and results[1 - victim] == "the peer's death was noticed"
    assert [name for name in names(tmp_path) if name.endswith(".partial")] != []
    assert [result[0] for result in run_ranks(work.resume, 2, str(tmp_path))] == [10, 10]
    lines: list[str] = []
    Checkpoints(tmp_path, report=lines.append).sweep()
    assert names(tmp_path) == ["latest", "step_00000010"] and len(lines) == 1


# From the rename on the new one counts, with or without the pointer, and with a deletion cut short.
@pytest.mark.parametrize("at", ["renamed", "published", "pruning"])
def test_kill_9_after_the_commit_keeps_the_new_one(tmp_path: Path, at: str) -> None:
    run_ranks(work.die_while_saving, 1, str(tmp_path), 0, at, may_die=[0], timeout=30)
    assert run_ranks(work.resume, 1, str(tmp_path))[0][0] == 20
    checkpoints = Checkpoints(tmp_path, keep=1, report=lambda line: None)
    checkpoints.sweep()
    assert names(tmp_path)[-1] == "step_00000020"
    work.save(0, 1, str(tmp_path), 3, 1)  # the next commit also prunes what the killed one did not get to
    assert names(tmp_path) == ["latest", "step_00000003"]


@pytest.mark.parametrize("how", ["full", "writing", "manifest", "renamed"])
def test_full_disk_and_failing_disk_reach_every_rank_and_leave_nothing(tmp_path: Path, how: str) -> None:
    # Commits happen on rank 0; the disk of any rank may fill up.
    victim = 1 if how in ("full", "writing") else 0
    results = run_ranks(work.fail_while_saving, 2, str(tmp_path), victim, how, timeout=60)
    assert results[0] == results[1]
    error, seen, newest = results[0]
    assert ("File too large" if how == "full" else "Input/output error") in error
    if victim == 1:
        assert "rank 1: " in error and "rank 0: " not in error
    assert seen == ["latest", "step_00000010"] and newest == "step_00000010"
    assert names(tmp_path) == ["latest", "step_00000010", "step_00000030"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda path: (path / "00000.data").write_bytes((path / "00000.data").read_bytes()[:-1]),
            "bytes instead of",
        ),
        (lambda path: (path / "00000.data").unlink(), "00000.data (written by rank 0) is missing"),
        (lambda path: (path / "index.json").write_bytes(b""), "index.json has 0 bytes"),
        (lambda path: (path / "meta.json").unlink(), "meta.json is missing"),
        (lambda path: (path / "meta.json").write_text("{"), "damaged"),
        (lambda path: (path / "meta.json").write_text('{"format": 1}'), "damaged"),
        (lambda path: (path / "meta.json").write_bytes(b"\xff\xfe"), "damaged"),
    ],
)
def test_damaged_checkpoint_is_skipped_with_one_line(tmp_path: Path, damage: Any, said: str) -> None:
    small(tmp_path, [10, 20, 30])
    damage(tmp_path / "step_00000030")
    lines: list[str] = []
    checkpoints = Checkpoints(tmp_path, report=lines.append)
    assert checkpoints.newest() == tmp_path / "step_00000020"
    assert len(lines) == 1 and said in lines[0] and "step_00000030" in lines[0]
    assert value(checkpoints) == 20
    with pytest.raises(CheckpointError, match="step_00000030"):
        checkpoints.load(tmp_path / "step_00000030", {"model/w": torch.zeros(100)})


def test_damage_that_keeps_the_size_is_walked_back_over(tmp_path: Path) -> None:
    small(tmp_path, [10, 20])
    index = tmp_path / "step_00000020" / "index.json"
    index.write_bytes(b"\0" * index.stat().st_size)
    lines: list[str] = []
    checkpoints = Checkpoints(tmp_path, report=lines.append)
    assert value(checkpoints) == 10
    assert len(lines) == 1 and "index.json is damaged, or of another save than meta.json" in lines[0]


def test_none_loadable_ends_with_78(tmp_path: Path) -> None:
    small(tmp_path, [10, 20])
    for step in (10, 20):
        (tmp_path / f"step_000000{step}" / "index.json").unlink()
    with pytest.raises(NoLoadableCheckpoint, match=r"none of the 2 checkpoints.*index\.json is missing") as caught:
        Checkpoints(tmp_path, report=lambda line: None).newest()
    assert caught.value.exit_code == 78


def test_all_complete_but_unreadable_ends_with_78(tmp_path: Path) -> None:
    checkpoints = small(tmp_path, [10], report=lambda line: None)
    index = tmp_path / "step_00000010" / "index.json"
    index.write_bytes(b"\0" * index.stat().st_size)
    with pytest.raises(NoLoadableCheckpoint) as caught:
        value(checkpoints)
    assert caught.value.exit_code == 78


def test_vanished_checkpoints_are_not_a_fresh_start(tmp_path: Path) -> None:
    small(tmp_path, [10])
    (tmp_path / "step_00000010").rename(tmp_path / "elsewhere")
    with pytest.raises(NoLoadableCheckpoint, match="Bring them back, or remove that file"):
        Checkpoints(tmp_path).newest()


@pytest.mark.parametrize("content", [None, "", "step_00000099\n", "\0\0\0"])
def test_the_pointer_is_not_needed(tmp_path: Path, content: str | None) -> None:
    small(tmp_path, [10, 20])
    (tmp_path / "latest").unlink()
    if content is not None:
        (tmp_path / "latest").write_text(content)
    assert Checkpoints(tmp_path).newest() == tmp_path / "step_00000020"


def test_retention(tmp_path: Path) -> None:
    checkpoints = small(tmp_path, [10, 20, 30, 40, 50, 60], keep=2, keep_every=30)
    assert [entry.step for entry in checkpoints.list()] == [60, 50, 30]
    assert names(tmp_path) == ["latest", "step_00000030", "step_00000050", "step_00000060"]
    assert len(small(tmp_path / "all", [1, 2, 3, 4, 5], keep=None).list()) == 5


def test_what_is_removed_loses_its_name_before_its_files(tmp_path: Path) -> None:
    checkpoints = small(tmp_path, [10], keep=1)
    seen: list[list[str]] = []
    points.observer = lambda point: seen.append(names(tmp_path)) if point == "pruning" else None
    try:
        small(tmp_path, [20], keep=1)
    finally:
        points.observer = None
    assert len(seen) == 1 and seen[0][0].endswith(".trash") and seen[0][1:] == ["latest", "step_00000020"]
    assert names(tmp_path) == ["latest", "step_00000020"] and value(checkpoints) == 20


def test_retention_counts_only_complete_ones(tmp_path: Path) -> None:
    checkpoints = small(tmp_path, [10, 20], keep=2)
    (tmp_path / "step_00000020" / "index.json").unlink()
    small(tmp_path, [30], keep=2)
    assert [entry.step for entry in checkpoints.list()] == [30, 20, 10]  # 10 is one of the two that can be loaded
    small(tmp_path, [40], keep=2)
    assert [entry.step for entry in checkpoints.list()] == [40, 30]


def test_saving_a_step_again_replaces_it_safely(tmp_path: Path) -> None:
    checkpoints = small(tmp_path, [10, 20])
    seen: list[list[str]] = []
    points.observer = lambda point: seen.append(names(tmp_path)) if point == "renamed" else None
    try:
        path = checkpoints.save(20, {"model/w": torch.full((100,), -20.0)}, {"step": 20})
    finally:
        points.observer = None
    assert "step_00000020" in seen[0] and "step_00000020.2" in seen[0]  # at no time was there none
    assert path.name == "step_00000020.2" and value(checkpoints) == -20
    assert [entry.path.name for entry in checkpoints.list()] == ["step_00000020.2", "step_00000010"]


def test_newest_is_what_was_committed_last(tmp_path: Path) -> None:
    """A run that went back to step 10 and then saved 15 goes on from 15, not from the abandoned 20."""
    checkpoints = small(tmp_path, [10, 20, 15], keep=None)
    assert value(checkpoints) == 15
    assert [entry.step for entry in checkpoints.list()] == [15, 20, 10]


def test_the_coordinator_decides_what_exists(tmp_path: Path) -> None:
    small(tmp_path, [10, 20])
    assert run_ranks(work.disagree, 2, str(tmp_path)) == ["step_00000020", "step_00000020"]


def test_misfit_on_one_rank_is_refused_by_all_with_the_names(tmp_path: Path) -> None:
    run_ranks(work.save, 2, str(tmp_path), 1)
    texts = run_ranks(work.misfit, 2, str(tmp_path))
    assert texts[0] == texts[1]
    assert "missing from the checkpoint: model/extra (float32 [2])" in texts[0]
    assert "in the checkpoint but not asked for: model/count" in texts[0]


def test_refusal_by_the_check_ends_the_resume(tmp_path: Path) -> None:
    checkpoints = small(tmp_path, [10, 20])

    def check(meta: dict[str, Any]) -> None:
        raise ValueError(f"step {meta['step']} is of another model")

    tensors = {"model/w": torch.zeros(100)}
    with pytest.raises(ValueError, match=r"^step 20 is of another model$"):
        checkpoints.resume(tensors, check)
    assert float(tensors["model/w"].sum()) == 0


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="meta must be what JSON can hold"):
        Checkpoints(tmp_path).save(1, {"model/w": torch.zeros(1)}, {"path": Path()})
    assert names(tmp_path) == []


def test_names_on_disk() -> None:
    assert [on_disk.checkpoint_name(100), on_disk.checkpoint_name(123456789, 2)] == [
        "step_00000100",
        "step_123456789.2",
    ]
