"""Near saves with real ranks and real kills; hosts are folders that some ranks share and others do not see."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.folder import Entry
from pretrain.checkpoint.near import choice, room
from pretrain.checkpoint.near.choice import Disk
from pretrain.checkpoint.near.hosts import Hosts
from pretrain.checkpoint.near.parts import Part, Save
from tests.pretrain.checkpoint import near_ranks as work
from tests.ranks import Died, run_ranks

TWO = (0, 1)  # two ranks, each on a host of its own
FOUR = (0, 0, 1, 1)


def resume(base: Path, place: tuple[int, ...] = TWO) -> work.Back:
    """As rank 0 has it; all ranks must have got the same."""
    return resume_each(base, {}, place=place)[0]


def resume_each(base: Path, *options: dict[str, Any], place: tuple[int, ...] = TWO) -> list[work.Back]:
    """One attempt after the other."""
    results = run_ranks(work.resume_each, len(place), base, place, options)
    for attempts in zip(*results, strict=True):
        assert len({back.step for back in attempts}) == 1 and all(back.good for back in attempts), attempts
    return list(results[0])


def files(base: Path, host: int, name: str) -> list[Path]:
    return sorted((base / f"host{host}").rglob(name))


def flip(path: Path, byte: int = 5000) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 16
    path.write_bytes(data)


def test_who_keeps_whose_copy() -> None:
    assert [Hosts("aabb").buddy(rank) for rank in range(4)] == [2, 3, 0, 1]
    assert [Hosts("abab").buddy(rank) for rank in range(4)] == [1, 0, 3, 2]
    assert [Hosts("aabbcc").buddy(rank) for rank in range(6)] == [2, 3, 4, 5, 0, 1]
    assert [Hosts("abbb").buddy(rank) for rank in range(4)] == [1, 0, 0, 0]
    assert [Hosts("aa").buddy(rank) for rank in range(2)] == [None, None]


def test_every_part_lies_on_two_hosts_and_comes_back_wherever_the_ranks_are(tmp_path: Path) -> None:
    lines = run_ranks(work.save, 4, tmp_path, FOUR, [10, 20])
    assert lines == [[], [], [], []]
    for host in (0, 1):
        assert [path.name for path in files(tmp_path, host, "*.data")] == [f"{rank:05d}.data" for rank in range(4)]
        assert {path.parent.name.split(".")[0] for path in files(tmp_path, host, "*.json")} == {"step_00000020"}
        (run,) = (tmp_path / f"host{host}").iterdir()
        assert run.stat().st_mode & 0o777 == 0o700
    back = resume(tmp_path, FOUR)
    assert (back.step, back.lines) == (20, ["resuming step 20 from near memory, there is no checkpoint"])
    shutil.rmtree(tmp_path / "host0")  # a node is replaced by an empty one
    assert resume(tmp_path, FOUR).step == 20
    shutil.rmtree(tmp_path / "host1")  # now it is the other one's turn: the first has its own parts, and no others
    back = resume(tmp_path, FOUR)
    assert back.step is None
    assert back.lines == ["step 20 in near memory cannot be used: no host has the part of rank 2, 3"]


def test_ranks_may_change_places(tmp_path: Path) -> None:
    run_ranks(work.save, 4, tmp_path, FOUR, [10])
    for path in files(tmp_path, 0, "00002.*") + files(tmp_path, 1, "0000[01].*"):
        path.unlink()  # so that what is on the wrong host must travel
    assert resume(tmp_path, (1, 1, 0, 0)).step == 10
    assert [path.name for path in files(tmp_path, 1, "*.data")] == [
        "00000.data",
        "00001.data",
        "00002.data",
        "00003.data",
    ]


def test_on_one_host_processes_may_die(tmp_path: Path) -> None:
    run_ranks(work.save, 2, tmp_path, (0, 0), [10])
    assert [path.name for path in files(tmp_path, 0, "*.data")] == ["00000.data", "00001.data"]
    assert resume(tmp_path, (0, 0)).step == 10


def test_without_a_process_group(tmp_path: Path) -> None:
    work.save(0, 1, tmp_path, (0,), [10, 20])
    assert run_ranks(work.resume, 1, tmp_path, (0,))[0].step == 20


@pytest.mark.parametrize("name", ["00001.data", "00001.json"])
def test_a_flipped_bit_is_found_and_the_other_copy_taken(name: str, tmp_path: Path) -> None:
    run_ranks(_save_keeping_two, 2, tmp_path)
    (own,) = [path for path in files(tmp_path, 1, name) if "step_00000020" in str(path)]
    flip(own, 5000 if name.endswith("data") else 100)
    back = resume(tmp_path)
    assert back.step == 20
    if name.endswith("data"):
        assert "bit 4 of byte 5000 is flipped" in back.lines[0] and "copy on another host is good" in back.lines[0]
    (copy,) = [path for path in files(tmp_path, 0, name) if "step_00000020" in str(path)]
    assert own.read_bytes() == copy.read_bytes()  # mended by the way
    for path in (own, copy):
        flip(path, 5000 if name.endswith("data") else 100)
    back = resume(tmp_path)
    assert back.step == 10 and "step 20 in near memory cannot be used" in back.lines[0]
    for path in files(tmp_path, 0, "00000.data") + files(tmp_path, 1, "00000.data"):
        path.write_bytes(path.read_bytes()[:-1])
    back = resume(tmp_path)
    assert back.step is None and "bytes instead of" in back.lines[-1]


def _save_keeping_two(rank: int, world: int, base: Path) -> list[str]:
    return work.save(rank, world, base, TWO, [10, 20], keep=2)


# (point, rank that dies, step that is there if the processes died, steps that may be if the dead rank's host is lost with it)
KILLS = [
    ("near: before own", 0, 10, set()),  # not tried: there is less of step 20 than at the next point
    ("near: half of own", 1, 10, {10}),
    ("near: before the buddy's", 1, 20, {10}),
    ("near: half of the buddy's", 0, 20, {10, 20}),  # the other rank may have got all of this one's part, or not yet
    ("near: complete", 1, 20, {20}),
    ("near: pruned", 0, 20, {20}),
]


@pytest.mark.parametrize(("at", "victim", "after", "after_loss"), KILLS, ids=[at for at, *_ in KILLS])
def test_kill_9_during_a_save(at: str, victim: int, after: int, after_loss: set[int], tmp_path: Path) -> None:
    base, copy = tmp_path / "job", tmp_path / "copy"
    results = run_ranks(work.die, 2, base, TWO, victim, at, may_die=[victim], timeout=30)
    assert results[victim] == Died(-9)
    shutil.copytree(base, copy)
    assert resume(base).step == after
    if not after_loss:
        return
    shutil.rmtree(base)
    copy.rename(base)
    shutil.rmtree(base / f"host{victim}")
    back = resume(base)
    assert back.step in after_loss and str(back.step) in back.saves
    assert not files(base, 0, ".*.arriving")


def test_another_layout_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    run_ranks(work.save, 2, tmp_path, TWO, [10])
    (back,) = resume_each(tmp_path, {"layout": "three ranks"}, place=(0, 1, 1))
    assert back.step is None
    assert back.lines == ["step 10 in near memory cannot be used: it was made by as ever, and this job is three ranks"]
    across, refused, again = resume_each(tmp_path, {"dim": 1}, {"refuse": 10}, {})
    assert across.step is None and "cut into other blocks" in across.lines[0]  # as many ranks, and another dim
    assert refused.step is None and refused.lines == ["step 10 in near memory cannot be used: another model"]
    assert again.step == 10  # nothing was lost by the attempts


def entry(sequence: int, step: int, fault: str = "") -> Entry:
    return Entry(Path(f"step_{step}"), step, 1, {"sequence": sequence}, fault)


def test_only_what_is_newer_than_the_newest_checkpoint(tmp_path: Path) -> None:
    run_ranks(work.save, 2, tmp_path, TWO, [10])
    not_newer, back = resume_each(tmp_path, {"disk": (entry(1, 10),)}, {"disk": (entry(2, 12, "damaged"), entry(1, 8))})
    assert not_newer.step is None and not_newer.lines == []
    assert (back.step, back.lines) == (10, ["resuming step 10 from near memory, newer than the checkpoint of step 8"])


def test_the_rule_of_what_is_newer() -> None:
    def save(step: int, base: int) -> Save:
        return Save("a", 1, step, base, 1, "")

    disk = Disk.of([entry(6, 100), entry(5, 90)])
    assert disk.as_new_as(save(100, 5)) and disk.as_new_as(save(95, 5)) and disk.as_new_as(save(100, 0))
    assert not disk.as_new_as(save(101, 5))  # the checkpoint of step 100 was committed after it
    assert not disk.as_new_as(save(60, 6))  # the run has gone back after that checkpoint, and on from there
    assert not Disk.of([]).as_new_as(save(1, 0))
    found = choice.gathered({"h": [Part(save(101, 7), 0, "b", 1)]})[0]
    assert "has been removed" in choice.fault(found, disk, "", ["b"])  # by somebody who wants to go back
    assert choice.fault(found, Disk.of([entry(7, 101, "damaged"), entry(6, 100)]), "", ["b"]) == ""
    unreadable = Entry(Path("step_101"), 101, 1, {}, "meta.json is missing")
    assert choice.fault(found, Disk.of([unreadable, entry(6, 100)]), "", ["b"]) == ""


HOWS = {
    "near: half of own": "not kept in near memory (near memory: writing: rank 1: OSError: [Errno 5] Input/output error)",
    "near: before the buddy's": "the part of rank 0: [Errno 5] Input/output error",
    "flipped": "the part of rank 0: it was damaged in memory or on its way",
    "full": "File too large",
    "busy": "not kept in near memory, the save before it is under way",
}


@pytest.mark.parametrize("how", HOWS)
def test_a_save_that_fails_on_one_rank_fails_on_all_and_the_next_is_tried(how: str, tmp_path: Path) -> None:
    results = run_ranks(work.fail, 2, tmp_path, TWO, 1, how)
    for made, _, middle, left, off in results:
        assert (made, middle, left, off) == ([True, False, True], ["step_00000010"], ["step_00000030"], "")
    assert len(results[0][1]) == 1 and results[1][1] == [] and HOWS[how] in results[0][1][0]


def test_no_room_turns_it_off(tmp_path: Path) -> None:
    results = run_ranks(work.fail, 2, tmp_path, TWO, 1, "no room")
    for made, _, _, left, off in results:
        assert made == [True, False, False] and left == ["step_00000010"] and "and 1000 are left" in off
    (line,) = results[0][1]
    assert line.startswith("no more saves in near memory: step 20 takes ") and "on the host of rank 1" in line
    assert resume(tmp_path).step == 10


def test_a_folder_that_cannot_be_used_turns_it_off(tmp_path: Path) -> None:
    (tmp_path / "host1").write_text("")
    results = run_ranks(_opened, 2, tmp_path)
    assert [off for off, _ in results] == [results[0][0]] * 2 and "rank 1: " in results[0][0]
    assert len(results[0][1]) == 1 and results[1][1] == []


def _opened(rank: int, world: int, base: Path) -> tuple[str, list[str]]:
    lines: list[str] = []
    config = work.NearConfig(folder=base / f"host{rank}")
    config.folder.mkdir(exist_ok=True) if rank == 0 else None
    tier = work.Tier(config, base / "run" / "checkpoints", "", agreement=work.Agreement(), report=lines.append)
    assert not tier.save(1, None, {}) and tier.resume({}, {}, [], lambda meta: None) is None
    tier.forget()
    tier.clear()
    return tier.off, lines


def test_parts_of_an_earlier_run_in_the_same_folder_are_never_taken(tmp_path: Path) -> None:
    run_ranks(work.save, 2, tmp_path, TWO, [10])
    other = tmp_path / "host0" / "somebody else's"
    other.mkdir()
    shutil.rmtree(tmp_path / "run")
    back = resume(tmp_path)
    assert back.step is None and back.lines == [] and files(tmp_path, 0, "*.data") == [] and other.exists()


def test_forgotten_saves_do_not_come_back_with_a_host_that_still_has_them(tmp_path: Path) -> None:
    results = run_ranks(work.forget, 2, tmp_path, TWO, tmp_path / "copy")
    assert results == [[], []] and len(files(tmp_path, 0, "*.data")) == 2
    assert resume(tmp_path).step is None
    assert files(tmp_path, 0, "*.data") == []


def test_clearing_leaves_nothing(tmp_path: Path) -> None:
    run_ranks(work.clear, 2, tmp_path, TWO)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert list((tmp_path / "host0").iterdir()) == [] == list((tmp_path / "host1").iterdir())


def test_room_in_memory_is_no_more_than_the_control_group_has_left(tmp_path: Path) -> None:
    group = tmp_path / "job" / "step"
    group.mkdir(parents=True)
    for folder, limit in ((tmp_path / "job", "1000"), (group, "max")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("800\n")
        (folder / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    assert room._cgroups(tmp_path, tmp_path / "cgroup") == [500]
    assert room._cgroups(tmp_path, tmp_path / "absent") == []
    assert 0 < room.free_bytes(tmp_path) <= shutil.disk_usage(tmp_path).free + (1 << 30)
