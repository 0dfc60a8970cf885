"""One key set in a YAML file, and all else as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from parallel.fabric import __main__ as command
from parallel.fabric.writing import with_key, write_key
from pretrain.config import load
from pretrain.estimate.hardware import read

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("text", "after", "before"),
    [
        ("a: 1\n", "a: 1\nengine:\n  bucket: 7\n", None),
        ("", "engine:\n  bucket: 7\n", None),
        ("a: 1", "a: 1\nengine:\n  bucket: 7\n", None),
        ("engine:\n  kind: torch  # ours\nb: 2\n", "engine:\n  kind: torch  # ours\n  bucket: 7\nb: 2\n", None),
        (
            "engine:\n    kind: torch\n\n# next\nb: 2\n",
            "engine:\n    kind: torch\n    bucket: 7\n\n# next\nb: 2\n",
            None,
        ),
        ("engine:\n  bucket: 3  # why\n  kind: torch\n", "engine:\n  bucket: 7  # why\n  kind: torch\n", "3"),
        ("engine: {kind: torch}  # x\nb: 2\n", "engine: {kind: torch, bucket: 7}  # x\nb: 2\n", None),
        ("engine: {}\nb: 2\n", "engine: {bucket: 7}\nb: 2\n", None),
        ("engine: {kind: torch, bucket: 3}\n", "engine: {kind: torch, bucket: 7}\n", "3"),
        ("engine:\nb: 2\n", "engine: {bucket: 7}\nb: 2\n", None),
        ("engine:\n  bucket: null\nb: 2\n", "engine:\n  bucket: 7\nb: 2\n", "null"),
        ("engine:\n  bucket:\nb: 2\n", "engine:\n  bucket: 7\nb: 2\n", None),
        (
            "engine:\n  list:\n    - 1\n    - 2\n# c\nb: 2\n",
            "engine:\n  list:\n    - 1\n    - 2\n  bucket: 7\n# c\nb: 2\n",
            None,
        ),
        ("# only a comment\n", "# only a comment\nengine:\n  bucket: 7\n", None),
    ],
)
def test_one_key(text: str, after: str, before: str | None) -> None:
    assert with_key(text, "engine.bucket", 7) == (after, before)


def test_a_list_of_mappings_replaces_another() -> None:
    text = "fabric:\n  node: {gpus: 8}\n  measured:\n    - {a: 1}\n    - {a: 2}  # old\n# after\nb: 2\n"
    new, _ = with_key(text, "fabric.measured", [{"a": 3}, {"a": 4.5}])
    assert new == "fabric:\n  node: {gpus: 8}\n  measured: [\n    {a: 3},\n    {a: 4.5},\n  ]  # old\n# after\nb: 2\n"
    again, _ = with_key(new, "fabric.measured", [{"a": 5}])
    assert yaml.safe_load(again) == {"fabric": {"node": {"gpus": 8}, "measured": [{"a": 5}]}, "b": 2}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("engine: torch\n", "engine is no section with keys of its own; set it by hand: engine.bucket: 7"),
        ("- a\n", "expected sections"),
        ("a: [\n", "not valid YAML"),
        ("x: &s {a: 1}\nengine: *s\n", "cannot be edited safely"),
    ],
)
def test_what_is_left_alone(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=part):
        write_key(path, "engine.bucket", 7)
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------ the command


def results(path: Path, **changes: Any) -> Path:
    """What the benchmark writes, of a fabric of 40 us and 10 GB/s over four ranks on two nodes."""
    rows = [
        {
            "op": op, "group": "dp", "ranks": 4, "bytes": 1 << k, "dtype": "fp32", "in_place": in_place, "wrong": 0,
            "microseconds": 40 + (1 << k) * 0.75 / 10e3 + 9e9 * (in_place != (op == "all_reduce")),
        }
        for op in ("reduce_scatter", "all_gather", "all_reduce", "barrier")
        for k in range(10, 28)
        for in_place in (False, True)
    ]  # fmt: skip
    document = {
        "convention": "nccl-tests", "complete": True, "machine": {"ranks_per_node": 2},
        "groups": [{"name": "dp", "size": 4, "stride": 1}], "rows": rows, **changes,
    }  # fmt: skip
    path.write_text(json.dumps(document))
    return path


def test_a_recommendation_goes_into_a_training_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    original = (ROOT / "configs/runs/quickstart.yaml").read_text()
    config.write_text(original)
    assert command.main([str(results(tmp_path / "r.json")), "--write-config", str(config)]) == 0
    told = capsys.readouterr().out
    bucket = 1 << 23  # 9 * 40 us * 10 GB/s / 0.75 = 4.8 MB
    assert f"engine.bucket_bytes={bucket}" in told
    assert f"{config}: engine.bucket_bytes = {bucket}" in told
    assert load(config).engine.bucket_bytes == bucket
    assert [line for line in original.splitlines() if line not in config.read_text().splitlines()] == []
    assert command.main([str(tmp_path / "r.json"), "--write-config", str(config)]) == 0
    assert f"(was {bucket})" in capsys.readouterr().out


def test_measurements_go_into_a_hardware_file(tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text((ROOT / "configs/hardware/h100.yaml").read_text())
    assert command.main([str(results(tmp_path / "r.json")), "--write-hardware", str(path)]) == 0
    fabric = read(path).fabric
    assert fabric is not None
    assert {(each.op, each.ranks, each.ranks_in_node) for each in fabric.measured} == {
        (op, 4, 2) for op in ("all_reduce", "reduce_scatter", "all_gather")
    }
    assert fabric.seconds("all_gather", 1e9, 4, 2) == pytest.approx(40e-6 + 0.75e9 / 10e9, rel=1e-3)
    assert "# How long an InfiniBand" in path.read_text()


def test_bad_usage_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, config = results(tmp_path / "r.json"), tmp_path / "run.yaml"
    config.write_text("model: {}\n")
    (tmp_path / "other.json").write_text("{}")
    for arguments, part in (
        ([str(tmp_path / "none.json")], "No such file"),
        ([str(tmp_path / "other.json")], "not a result of the collective benchmark"),
        ([str(good), "--group", "tp"], "--group tp: not measured"),
        ([str(good), "--write-config", str(config)], "it has no train section"),
        ([str(good), "--write-hardware", str(config)], "has no fabric section"),
        ([str(good), "--level", "2"], "level = 2.0"),
    ):
        assert command.main(arguments) == 2
        told = capsys.readouterr().err
        assert part in told and told.count("\n") == 1, told
    assert config.read_text() == "model: {}\n"


def test_nothing_measured_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("train: {}\n")
    assert command.main([str(results(tmp_path / "r.json", rows=[])), "--write-config", str(config)]) == 1
    assert "there is no recommendation" in capsys.readouterr().err
    assert config.read_text() == "train: {}\n"
