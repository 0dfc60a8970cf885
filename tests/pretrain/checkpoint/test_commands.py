"""The command line: what it prints and how it exits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.__main__ import main
from pretrain.checkpoint.lifecycle import Checkpoints
from pretrain.checkpoint.planned import read_index
from tests.ranks import launch


@pytest.fixture
def run(tmp_path: Path) -> Path:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=None)
    for step in (10, 20, 30):
        tensors = {"model/w": torch.full((300,), float(step)), "optimizer/w/step": torch.tensor(float(step))}
        meta: dict[str, Any] = {"step": step, "tokens": 1000 * step, "config": {"model": {}}}
        checkpoints.save(step, tensors, meta, {"rng": torch.zeros(4, dtype=torch.uint8)})
    return tmp_path


def damage(run: Path, *steps: int) -> None:
    for step in steps:
        (run / "checkpoints" / f"step_000000{step}" / "index.json").unlink()


def test_list(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run, 30)
    assert main(["list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["checkpoint", "step_00000030", "step_00000020", "step_00000010"]
    assert lines[1].rstrip().endswith("damaged: index.json is missing")
    assert lines[2].rstrip().endswith("newest") and lines[3].rstrip().endswith("complete")
    damage(run, 10, 20)
    assert main(["list", str(run / "checkpoints")]) == 78


def test_inspect(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run), "--tensors"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["step"] == ["30"] and rows["tokens"] == ["30000"] and rows["ranks"] == ["1,", "each", "with", "rng"]
    assert rows["model"] == ["1", "tensors,", "1.2", "KiB"]
    assert rows["model/w"] == ["float32", "[300]"] and rows["optimizer/w/step"] == ["float32", "[]"]
    assert rows["rank/0/rng"] == ["uint8", "[4]"]
    assert main(["inspect", str(run / "checkpoints" / "step_00000010")]) == 0
    out = capsys.readouterr().out
    assert "step_00000010" in out and "model/w" not in out
    damage(run, 10)
    assert main(["inspect", str(run / "checkpoints" / "step_00000010")]) == 1


def test_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run / "checkpoints" / "step_00000030"
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": good, ") == 3
    weights = torch.full((300,), 1.0)
    weights[7], weights[9] = float("nan"), float("inf")
    Checkpoints(run / "checkpoints", keep=None).save(40, {"model/w": weights, "model/ok": torch.ones(1)}, {})
    assert main(["verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert "  model/w: 2 of 300 numbers are not finite" in out and "model/ok" not in out
    data = one / "00000.data"
    data.write_bytes(data.read_bytes()[:-1])
    assert main(["verify", str(one)]) == 78
    assert "instead of" in capsys.readouterr().out
    damage(run, 10, 20)
    assert main(["verify", str(run)]) == 78  # each of the four now has a fault


def test_verify_reads_the_bytes_and_names_the_tensor(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Damage that leaves the size as it was, in one tensor of three."""
    one = run / "checkpoints" / "step_00000030"
    place = next(place for index, place in read_index(one)[1].items() if index.fqn == "rank/0/rng")
    data = one / place.file
    content = bytearray(data.read_bytes())
    content[place.start] ^= 4
    data.write_bytes(bytes(content))
    assert main(["verify", str(one)]) == 78
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{one}: damaged"
    assert second.startswith(f"  {data} (written by rank 0): block 1 of 1 (bytes 0 to {len(content) - 1}) is damaged: ")
    assert f"bit 2 of byte {place.start} is flipped, and nothing else" in second and "rank/0/rng" in second


def test_usage_errors_exit_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(tmp_path / "absent")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 2
    assert "no checkpoints yet" in capsys.readouterr().err
    assert main(["list", str(tmp_path)]) == 0
    with pytest.raises(SystemExit) as caught:
        main(["destroy", str(tmp_path)])
    assert caught.value.code == 2


def test_help_imports_neither_torch_nor_rich() -> None:
    code = "import sys, runpy\nsys.argv = ['x', '--help']\ntry: runpy.run_module('pretrain.checkpoint', run_name='__main__')"
    code += "\nexcept SystemExit as e: print(e.code, sorted({'torch', 'rich', 'pydantic'} & set(sys.modules)))"
    done = launch(["-c", code], None)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


def test_list_as_a_command_needs_no_torch(run: Path) -> None:
    done = launch(["-X", "importtime", "-m", "pretrain.checkpoint", "list", str(run)], None)
    assert done.returncode == 0 and "step_00000030" in done.stdout
    assert " torch\n" not in done.stderr
