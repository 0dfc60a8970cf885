"""A ceiling that a run exceeds: no number, one error, and an exit code where figures are what the run is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.train import loop
from tests.pretrain.train.small_run import configuration, records

CHIP = "name: none\nbf16_tflops: {0}\nfp32_tflops: {0}\nmemory_gib: 1\nmemory_bandwidth_gbs: 1\n"


@pytest.mark.parametrize(("tflops", "profiled", "code"), [(1e-6, False, 0), (1e-6, True, 1), (1e6, True, 0)])
def test_a_share_above_one(corpus: Path, tmp_path: Path, tflops: float, profiled: bool, code: int) -> None:
    chip, run = tmp_path / "chip.yaml", tmp_path / "run"
    chip.write_text(CHIP.format(tflops))
    overrides = ["train.steps=2", f"hardware={chip}", *["profile.start=2", "profile.steps=1"] * profiled]
    assert loop.train(configuration(run, corpus, *overrides)) == code
    exceeded = tflops < 1
    assert [record["mfu"] is None for record in records(run)] == [exceeded] * 2
    assert all(record["mfu_measured"] > 0 for record in records(run))
    events = run / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
    assert len(lines) == exceeded
    for line in lines:
        assert (line["step"], line["event"], line["level"], line["ceiling"]) == (1, "impossible", "error", "mfu")
        assert str(chip) in line["text"] and "FLOPs" in line["text"] and "hardware=..." in line["text"]
