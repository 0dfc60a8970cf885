"""Preparation killed at random moments, again and again, until it is through: no unit twice, and the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.data.__main__ import main
from tests.pretrain.data.test_prepare import contents

ROOT = Path(__file__).parents[3]
UNITS = 60


@pytest.mark.campaign
@pytest.mark.parametrize("seed", [0, 1])
def test_random_kills(prepared: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    line = "".join(f"value_{i} = compute(value_{i - 1}, {i * 7919})\n" for i in range(2000))
    rows = [json.dumps({"text": f"# {i}\n{line[: chance.randrange(len(line))]}"}) for i in range(300)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    size = (tmp_path / "rows.jsonl").stat().st_size
    words = ["prepare", "--input", f"{tmp_path}/rows.jsonl", "--unit-bytes", str(-(-size // UNITS))]
    words += ["--vocabulary", "400", "--sample-bytes", "200000", "--validation", "0.1", "--near-duplicates", "0.9"]
    assert main([*words, "--workers", "1", "--output", f"{tmp_path}/whole"]) == 0
    began = time.monotonic()
    assert run(words, tmp_path / "alone") == 0
    alone = time.monotonic() - began
    times: dict[str, int] = {}
    kills = 0
    while run(words, tmp_path / "killed", chance.uniform(0.1, 1.0) * alone if kills < 12 else None) != 0:
        kills += 1
        units = (tmp_path / "killed.parts" / "units").glob("*/record.json")
        found = {path.parent.name: path.stat().st_mtime_ns for path in units if not path.parent.suffix}
        assert all(found[name] == made for name, made in times.items() if name in found)  # none was made again
        # None is gone; or else the corpus is there, and the kill came while the units of it were removed.
        assert times.keys() <= found.keys() or (tmp_path / "killed").is_dir()
        times = found
    assert kills >= 2
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "killed", "rows.jsonl", "whole"]


def run(words: list[str], output: Path, kill_after: float | None = None) -> int:
    command = [sys.executable, "-m", "pretrain.data", *words, "--workers", "2", "--output", str(output)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        return process.wait(kill_after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return -1
