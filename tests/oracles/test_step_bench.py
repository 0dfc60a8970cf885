"""The bench of whole steps: small models of its three kinds, with figures that can be checked without a clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.step_bench import __main__ as step_bench
from launch.step_bench.models import Task, ours, theirs
from launch.step_bench.worker import Worker

pytest.importorskip("transformers")

SMALL = {"vocabulary": 61, "width": 16, "tie_embeddings": True}
SIZES = {
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 8,
    "value_dim": 8,
    "value_heads": 4,
    "hidden": 24,
    "experts": 4,
    "top_k": 2,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_bench, "COMMON", SMALL)

    def shrunk(section: dict[str, Any]) -> dict[str, Any]:
        return {key: SIZES.get(key, value) for key, value in section.items()}

    models = {
        name: (
            kind,
            {**layers, **{part: {k: shrunk(v) for k, v in layers[part].items()} for part in ("mixers", "ffns")}},
        )
        for name, (kind, layers) in step_bench.MODELS.items()
    }
    monkeypatch.setattr(step_bench, "MODELS", models)


def test_all_three(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "steps.json"
    options = ["--batch", "2", "--length", "40", "--rounds", "2", "--device", "cpu", "--precision", "fp32"]
    assert step_bench.main([*options, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [row["model"] for row in rows] == ["llama", "gdn", "moe"]
    for row in rows:
        assert row["loss_difference"] < 1e-5  # one model, twice
        assert row["memory"]["ours"] > 0 and row["memory"]["theirs"] > 0
        assert [len(taken) for taken in row["seconds"].values()] == [2, 2]
        assert row["ratio"] > 0
    table = capsys.readouterr().out
    assert "Qwen3-Next" in table and "2 x 40 tokens on cpu" in table


def test_a_step_trains_both_alike(small: None, tmp_path: Path) -> None:
    kind, layers = step_bench.MODELS["llama"]
    task = Task(kind, {**SMALL, **layers}, "fp32", 2, 40, "cpu", tmp_path)
    sides = {"theirs": theirs(task), "ours": ours(task)}
    losses = {who: [side.step() for _ in range(4)] for who, side in sides.items()}
    # Both decay all matrices but the (tied) embedding, which theirs decays, too: by 3e-5 of itself a step.
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-4)
    assert losses["ours"][3] < losses["ours"][0]


class Side:
    """Stands in for a process with a model."""

    def __init__(self, loss: float, seconds: float = 1.0):
        self.answers = {"loss": loss, "step": seconds, "memory": 7, "parameters": 5}

    def ask(self, what: str) -> Any:
        return self.answers[what]


def test_other_weights_are_noticed() -> None:
    with pytest.raises(SystemExit, match=r"llama: the two models differ by 1.0e-02 in their loss"):
        step_bench.measure({"ours": Side(4.04), "theirs": Side(4.0)}, "llama", 1)  # type: ignore[dict-item]


def test_the_ratio_is_how_many_times_longer_the_peer_takes() -> None:
    found = step_bench.measure({"ours": Side(4.0, 2.0), "theirs": Side(4.0, 6.0)}, "llama", 3)  # type: ignore[dict-item]
    assert found["ratio"] == 3.0 and found["seconds"] == {"ours": [2.0] * 3, "theirs": [6.0] * 3}


def test_a_side_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ours: Traceback.*theirs"):  # nobody has left weights there
        Worker("ours", Task("llama", SMALL, "fp32", 1, 8, "cpu", tmp_path), 1, False)
