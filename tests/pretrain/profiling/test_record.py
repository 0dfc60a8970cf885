"""`profile.start=N` in a run: the files, and figures that agree with the run's own."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.profiling.attribution import PHASES
from pretrain.profiling.record import profiler
from pretrain.train.progress import Progress
from tests.pretrain.train.small_run import configuration, records, train
from tests.ranks import TRAINING, run_ranks

SETTINGS = ("profile.start=3", "profile.steps=2", "profile.ranks=all", "train.steps=5")


def go(rank: int, world: int, run: Path, corpus: Path, overrides: tuple[str, ...]) -> int:
    return train(configuration(run, corpus, *overrides))


@pytest.mark.parametrize("ways", [(), ("mesh.pp=2",)], ids=["fsdp", "pipeline"])
def test_a_profiled_run(corpus: Path, tmp_path: Path, ways: tuple[str, ...]) -> None:
    assert run_ranks(go, 2, tmp_path / "run", corpus, (*SETTINGS, *ways), preload=TRAINING) == [0, 0]
    folder = tmp_path / "run/profile"
    expected = {f"step_00000003.rank_{r}.{kind}" for r in (0, 1) for kind in ("json", "txt", "png", "trace.json.gz")}
    assert {file.name for file in folder.iterdir()} == expected
    found = json.loads((folder / "step_00000003.rank_0.json").read_text())
    assert found["steps"] == 2 and set(found["phases"]) <= set(PHASES)
    # All of the time is given out, and it is about that of the two steps: what callbacks do lies between them.
    assert sum(found["phases"].values()) == pytest.approx(found["seconds"])
    steps = sum(record["step_seconds"] for record in records(tmp_path / "run")[2:4])
    assert found["seconds"] >= 0.9 * steps
    assert {"data", "forward", "backward", "collectives", "optimizer", "checkpoint"} <= set(found["phases"])
    assert all(found["phases"][name] > 0 for name in ("forward", "backward", "collectives", "optimizer"))
    blocks = [ways for name, ways in found["modules"].items() if "blocks.0" in name]
    assert sum(ways["forward"] for ways in blocks) > 0 and sum(ways["backward"] for ways in blocks) > 0
    assert sum(ways["recomputed"] for ways in blocks) == 0
    assert found["peak_bytes"] > 0
    trace = json.loads(gzip.decompress((folder / "step_00000003.rank_1.trace.json.gz").read_bytes()))
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert "braid: backward" in names and any(name.startswith("braid: module ") for name in names)
    table = (folder / "step_00000003.rank_0.txt").read_text()
    assert table.startswith("profile of step 3 to 4, ms a step: ") and "optimizer" in table


def said(rank: int, world: int, run: Path, corpus: Path, overrides: tuple[str, ...]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        go(rank, world, run, corpus, overrides)
    return out.getvalue()


def test_a_start_that_is_past_is_said(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_ranks(go, 1, run, corpus, ("train.steps=2",), preload=TRAINING) == [0]
    (text,) = run_ranks(said, 1, run, corpus, ("train.steps=3", "profile.start=2"), preload=TRAINING)
    assert "profile: step 2 is past (the run is at 2); nothing is profiled" in text
    assert not (run / "profile").exists()


def test_words_go_the_loops_way(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which knows of the bar in a terminal, and of who talks; brackets in them are no markup."""
    config = configuration(tmp_path, corpus, "profile.start=3")
    run: Any = SimpleNamespace(config=config, step=5, processes=SimpleNamespace(first=True))
    words: list[str] = []
    (recorder,) = profiler(config, words.append)
    recorder.on_start(run)
    assert words == ["profile: step 3 is past (the run is at 5); nothing is profiled"]
    assert capsys.readouterr().out == ""
    progress = Progress(every=1)
    progress.on_start(run)
    progress.say("a[0] :gear: [bold]")
    assert capsys.readouterr().out == "a[0] :gear: [bold]\n"
