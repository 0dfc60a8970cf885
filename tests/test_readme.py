"""Every command in README.md, run as it stands there, in a fresh copy of the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import QUIET, ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, flags=re.DOTALL)
SHELL = [line for kind, block in BLOCKS if kind == "bash" for line in block.strip().splitlines()]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]
# The environment of the tests stands in for the one that these two make, and the suite does not run itself.
GIVEN = {"source .venv/bin/activate", "bash launch/test.sh"}
QUICKSTART = "bash launch/quickstart.sh"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The files that git tracks, and a folder of somebody's text."""
    folder = tmp_path_factory.mktemp("readme") / "checkout"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)  # what a first run of either script would have made
    texts = folder / "my_text" / "deeper"
    texts.mkdir(parents=True)
    # Small documents, and few: every run ends with a pass over the twentieth of them that is held out.
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    text = "".join(source.read_text(encoding="utf-8") for source in sources)[: 256 * 1024]
    for start in range(0, len(text), 1024):
        (texts / f"{start}.txt").write_text(text[start : start + 1024])
    yield folder
    shutil.rmtree(folder)


def sh(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**QUIET, **os.environ, "PATH": path}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )


@pytest.mark.parametrize("command", [line for line in SHELL if line not in {*GIVEN, QUICKSTART}])
def test_command(command: str, checkout: Path) -> None:
    """In order: later commands use what earlier ones made."""
    done = sh(command, checkout)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.stdout.strip()


def test_every_launcher_started_the_same_job(checkout: Path) -> None:
    """What torchrun, deepspeed and accelerate were told above: two ranks each, and the same losses."""
    runs = [checkout / "runs" / name for name in ("fsdp", "zero", "accelerate")]
    for run in runs:
        assert json.loads((run / "checkpoints/step_00000004/meta.json").read_text())["world"] == 2
    first, *others = (
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs
    )
    assert len(first) == 4 and all(other == pytest.approx(first, rel=1e-3) for other in others)


@pytest.mark.parametrize("block", PYTHON)
def test_python(block: str, checkout: Path) -> None:
    done = sh(
        f"{sys.executable} - <<'PY'\n{block}\nassert model.config.vocabulary >= tokenizer.vocabulary_size\nPY", checkout
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "overrides",
    # One thread: with more of them each step waits for the cores that other tests are using.
    [["train.steps=120", "checkpoint.every=50", "cpu.threads=1"], pytest.param([], marks=pytest.mark.campaign)],
    ids=["an eighth", "whole"],
)
def test_quickstart(overrides: list[str], checkout: Path) -> None:
    """The promise of the page's first command: a killed and resumed run, fewer bits per byte than gzip and xz, a sample.

    An eighth of its steps is enough to come near gzip, a third to be better; without any it would be 1.9 times as many bits.
    """
    assert QUICKSTART in SHELL
    shutil.rmtree(checkout / "runs/quickstart", ignore_errors=True)
    environment = {
        key: value for key, value in os.environ.items() if key not in QUIET
    }  # as a person's shell: all cores
    done = subprocess.run(
        ["bash", "launch/quickstart.sh", *overrides],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    out = done.stdout
    assert re.search(r"killed process \d+", out) and "resumed after step" in out and "def read_lines(path):" in out
    bits = {
        name: float(value)
        for name, value in re.findall(r"^  (gzip -9|xz -9|this model) +([\d.]+)", out, flags=re.MULTILINE)
    }
    assert bits["this model"] < (1.3 * bits["gzip -9"] if overrides else bits["xz -9"])
    assert (checkout / "runs/quickstart/loss.png").exists()


def test_every_folder_of_the_tour_exists_and_every_command_is_covered() -> None:
    for name in re.findall(r"^\| `(\w+)/` \|", README, flags=re.MULTILINE):
        assert (ROOT / name).is_dir()
    assert GIVEN | {QUICKSTART} <= set(SHELL)
