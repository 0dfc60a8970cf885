"""The bench measures what it says: its numbers are all there, and nothing is left behind."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import bench
from pretrain.checkpoint.__main__ import main
from pretrain.checkpoint.bench import _beyond, ratios


def test_saves_and_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, folder = tmp_path / "bench.json", tmp_path / "disk"
    assert main(["bench", "--size", "20MiB", "--rounds", "1", "--folder", str(folder), "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    kinds = {f"{what} {name}" for what in ("save", "load") for name in ("plain", "ours", "dcp")}
    assert record["bytes"] == 20 << 20 and record["seconds"].keys() == record["processor_seconds"].keys() == kinds
    assert all(len(values) == 1 and values[0] > 0 for values in record["seconds"].values())
    assert record["ratios"] == ratios(record["seconds"]) and len(record["load"]) == 2
    assert list(folder.iterdir()) == []
    assert "save ours/plain" in capsys.readouterr().out


def test_ratios_are_medians_of_pairs() -> None:
    pair = {"plain": [1.0, 2.0, 9.0], "ours": [2.0, 2.0, 3.0], "dcp": [4.0, 4.0, 3.0]}
    found = ratios({f"{what} {name}": values for what in ("save", "load") for name, values in pair.items()})
    assert found["save ours/plain"] == 1.0 and found["load ours/dcp"] == 2.0


def test_steps_beside_a_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = bench._step

    def step_and_save(*arguments: Any) -> None:  # a busy disk may take longer than any number of steps
        step(*arguments)
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join(60)

    monkeypatch.setattr(bench, "_step", step_and_save)
    out = tmp_path / "bench.json"
    small = ["--size", "1MiB", "--rounds", "2", "--step-seconds", "0.05"]
    assert main(["bench", "--steps", *small, "--folder", str(tmp_path / "disk"), "--json", str(out)]) == 0
    stall = json.loads(out.read_text())["stall"]
    kinds = ("held", "saved", "step", "more", "control")
    assert {name: len(values) for name, values in stall.items()} == dict.fromkeys(kinds, 2)
    assert (
        "the mean of the ten steps around it" in capsys.readouterr().out and list((tmp_path / "disk").iterdir()) == []
    )


def test_what_a_save_costs_is_what_it_takes_beyond_the_undisturbed_steps() -> None:
    ends = [0.0, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5, 9.5, 10.5]
    step, more = _beyond(ends, 1, 0.25)
    assert step == 1.0 and more == pytest.approx((0.25 + 0.5) / 10)
