"""Every command in README.md, run as it stands there, in a fresh copy of the repository."""

from __future__ import annotations

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
    for number, source in enumerate(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]):
        shutil.copyfile(source, texts / f"{number}.txt")
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


@pytest.mark.parametrize("block", PYTHON)
def test_python(block: str, checkout: Path) -> None:
    done = sh(
        f"{sys.executable} - <<'PY'\n{block}\nassert model.config.vocabulary >= tokenizer.vocabulary_size\nPY", checkout
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "overrides", [["train.steps=400"], pytest.param([], marks=pytest.mark.campaign)], ids=["two fifths", "whole"]
)
def test_quickstart(overrides: list[str], checkout: Path) -> None:
    """The promise of the page's first command: a killed and resumed run, fewer bits per byte than gzip and xz, a sample.

    Two fifths of its steps are enough to be better than gzip.
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
    assert bits["this model"] < bits["gzip -9" if overrides else "xz -9"]
    assert (checkout / "runs/quickstart/loss.png").exists()


def test_every_folder_of_the_tour_exists_and_every_command_is_covered() -> None:
    for name in re.findall(r"^\| `(\w+)/` \|", README, flags=re.MULTILINE):
        assert (ROOT / name).is_dir()
    assert GIVEN | {QUICKSTART} <= set(SHELL)
