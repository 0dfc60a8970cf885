"""Damage at rest, of every kind and in every file: refused by name and walked back over with one line; with strict, refused."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.errors import NoLoadableCheckpoint
from pretrain.checkpoint.lifecycle import Checkpoints
from tests.ranks import TRAINING, run_ranks

Damage = Callable[[Path], None]
STEPS = (10, 20, 30)
FILES = ("00000.data", "00000.sums", "00001.data", "00001.sums", "index.json", "meta.json")


def cut(name: str, keep: Callable[[int], int]) -> Damage:
    def damage(newest: Path) -> None:
        data = (newest / name).read_bytes()
        (newest / name).write_bytes(data[: keep(len(data))])

    return damage


def gone(name: str) -> Damage:
    return lambda newest: (newest / name).unlink()


def flipped(name: str, seed: int) -> Damage:
    def damage(newest: Path) -> None:
        data = bytearray((newest / name).read_bytes())
        bit = random.Random(f"{name} {seed}").randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        (newest / name).write_bytes(data)

    return damage


def swapped(*pairs: tuple[str, str]) -> Damage:
    def damage(newest: Path) -> None:
        for one, other in pairs:
            a, b = (newest / one).read_bytes(), (newest / other).read_bytes()
            assert a != b
            (newest / one).write_bytes(b)
            (newest / other).write_bytes(a)

    return damage


def of_another_save(name: str, step: int) -> Damage:
    return lambda newest: shutil.copyfile(newest.parent / f"step_000000{step}" / name, newest / name) and None


def who(name: str) -> str:
    return rf"{re.escape(name)}" + (rf" \(written by rank {int(name[:5])}\)" if name[0] == "0" else "")


DAMAGES: dict[str, tuple[Damage, str]] = {}
for _name in FILES:
    _cut = f"{who(_name)} has \\d+ bytes instead of \\d+" if _name != "meta.json" else r"meta\.json is damaged"
    DAMAGES |= {
        f"{_name} cut to nothing": (cut(_name, lambda size: 0), _cut),
        f"{_name} cut to half": (cut(_name, lambda size: size // 2), _cut),
        f"{_name} without its last byte": (cut(_name, lambda size: size - 1), _cut),
        f"{_name} deleted": (gone(_name), f"{who(_name)} is missing"),
    }
    _flip = {
        "data": rf"{who(_name)}: block 1 of 1 .* is damaged: bit \d of byte \d+ is flipped, and nothing else",
        "sums": rf"{who(_name)} is damaged, or of another save",
        "json": rf"{_name} is damaged",
    }
    for _seed in (1, 2, 3):
        DAMAGES[f"{_name} with a flipped bit, {_seed}"] = (flipped(_name, _seed), _flip[_name[-4:]])
DAMAGES |= {
    "two shards swapped": (
        swapped(("00000.data", "00001.data")),
        r"00000\.data \(written by rank 0\): block 1 of 1 .* another file's bytes",
    ),
    "two shards swapped with their sums": (
        swapped(("00000.data", "00001.data"), ("00000.sums", "00001.sums")),
        r"00000\.sums \(written by rank 0\) is damaged, or of another save",
    ),
    "meta.json of the save before": (of_another_save("meta.json", 20), r"meta\.json is of another save: of step 20"),
    "meta.json of an older save": (of_another_save("meta.json", 10), r"meta\.json is of another save: of step 10"),
    "index.json of the save before": (of_another_save("index.json", 20), r"index\.json is damaged, or of another save"),
    "one shard of the save before": (of_another_save("00001.data", 20), r"00001\.data \(written by rank 1\): block 1 "),
}


def state(rank: int, step: float) -> dict[str, torch.Tensor]:
    return {f"model/{rank}": torch.full((300,), step + rank), f"optimizer/{rank}": torch.full((9,), -step)}


def write(rank: int, world: int, folder: Path) -> None:
    checkpoints = Checkpoints(folder, keep=None)
    for step in STEPS:
        checkpoints.save(step, state(rank, step), {"step": step}, {"rng": torch.tensor([step])})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints by two ranks."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(write, 2, folder)
    return folder


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_walked_back_over_or_refused(name: str, saved: Path, tmp_path: Path) -> None:
    damage, said = DAMAGES[name]
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    damage(folder / "step_00000030")
    loaded = {key: torch.zeros_like(tensor) for rank in (0, 1) for key, tensor in state(rank, 0).items()}

    lines: list[str] = []
    checkpoints = Checkpoints(folder, report=lines.append)
    checkpoints.newest()  # as a job does, which must not say things twice
    found = checkpoints.resume(loaded)
    assert found is not None and (found.step, found.meta) == (20, {"step": 20})
    assert all(torch.equal(loaded[key], tensor) for rank in (0, 1) for key, tensor in state(rank, 20).items())
    skipped = [line for line in lines if not line.endswith("starts anew")]  # one process reads what two wrote
    assert len(skipped) == 1 and "\n" not in skipped[0]
    assert skipped[0].startswith(f"skipping checkpoint {folder / 'step_00000030'}: ") and re.search(said, skipped[0])

    with pytest.raises(NoLoadableCheckpoint, match=said) as refusal:
        Checkpoints(folder, strict=True, report=lambda line: None).resume(loaded)
    assert refusal.value.exit_code == 78 and "\n" not in str(refusal.value)
    assert "step_00000030" in str(refusal.value) and "checkpoint.strict" in str(refusal.value)


def test_strict_takes_a_good_checkpoint_whatever_the_older_ones_are(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    (folder / "step_00000010" / "00000.data").unlink()
    flipped("00000.data", 1)(folder / "step_00000020")
    strict = Checkpoints(folder, strict=True, report=lambda line: None)
    loaded = {key: torch.zeros_like(tensor) for rank in (0, 1) for key, tensor in state(rank, 0).items()}
    found = strict.resume(loaded)
    assert found is not None and found.step == 30 and strict.newest() == folder / "step_00000030"
    assert Checkpoints(tmp_path / "empty", strict=True).resume(loaded) is None


def refuse(rank: int, world: int, folder: Path) -> tuple[list[str], str]:
    lines: list[str] = []
    model = {key: torch.zeros_like(tensor) for key, tensor in state(rank, 0).items()}
    found = Checkpoints(folder, report=lines.append).resume(model)
    assert (
        found is not None and found.step == 20 and torch.equal(model[f"model/{rank}"], state(rank, 20)[f"model/{rank}"])
    )
    try:
        Checkpoints(folder, strict=True).resume(model)
    except NoLoadableCheckpoint as error:
        return lines, str(error)
    return lines, ""


def test_two_ranks_say_it_once_and_refuse_alike(saved: Path, tmp_path: Path) -> None:
    """Only rank 1 reads the damaged shard."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    flipped("00001.data", 1)(folder / "step_00000030")
    (lines, text), (others, same) = run_ranks(refuse, 2, folder)
    assert others == [] and len(lines) == 1 and text == same
    for said in (lines[0], text):
        assert "rank 1: 00001.data (written by rank 1): block 1 of 1" in said, said


def job(rank: int, world: int, run: Path, corpus: Path, strict: bool) -> int:
    from tests.pretrain.train.small_run import configuration, train

    try:
        return train(configuration(run, corpus, "train.steps=2", "checkpoint.every=1", f"checkpoint.strict={strict}"))
    except NoLoadableCheckpoint as error:
        return error.exit_code


def test_a_job_with_strict_ends_with_78(corpus: Path, tmp_path: Path) -> None:

    assert run_ranks(job, 1, tmp_path, corpus, True, preload=TRAINING) == [0]
    newest = tmp_path / "checkpoints" / "step_00000002"
    flipped("00000.data", 1)(newest)
    assert run_ranks(job, 1, tmp_path, corpus, True, preload=TRAINING) == [78]
    assert run_ranks(job, 1, tmp_path, corpus, False, preload=TRAINING) == [0]  # from step 1, which is whole
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000002.2\n"
