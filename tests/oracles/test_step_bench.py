"""The bench of whole steps: small models of its three kinds, with figures that can be checked without a clock."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from launch.step_bench import __main__ as step_bench
from launch.step_bench.models import Task, Trained, document_lengths, ours, theirs
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
        assert row["memory"]["ours"] > 0 and row["memory"]["padded"] > 0
        assert [len(taken) for taken in row["seconds"].values()] == [2, 2]
        assert row["ratio"] > 0
    table = capsys.readouterr().out
    assert "Qwen3-Next" in table and "2 x 40 tokens on cpu" in table


def test_a_step_trains_both_alike(small: None, tmp_path: Path) -> None:
    kind, layers = step_bench.MODELS["llama"]
    task = Task(kind, {**SMALL, **layers}, "fp32", (40, 40), "cpu", tmp_path)
    sides = {"theirs": theirs(task), "ours": ours(task)}
    losses = {who: [side.step() for _ in range(4)] for who, side in sides.items()}
    # Both decay all matrices but the (tied) embedding, which theirs decays, too: by 3e-5 of itself a step.
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-4)
    assert losses["ours"][3] < losses["ours"][0]


def test_documents_are_drawn_once_for_all() -> None:
    lengths = document_lengths(100_000, 400, 4000)
    assert sum(lengths) == 100_000 and lengths == document_lengths(100_000, 400, 4000)
    assert max(document_lengths(100_000, 400, 600)) == 600
    # 250 documents wanted; the mean of so many log-normal lengths is known to about 8 %.
    assert 200 < len(lengths) < 310
    logarithms = [math.log(length) for length in lengths]
    assert statistics.median(logarithms) == pytest.approx(math.log(400) - 0.5, abs=0.25)


@pytest.mark.parametrize("name", ["llama", "gdn", "moe"])
def test_documents_reach_all_models_alike(small: None, tmp_path: Path, name: str) -> None:
    kind, layers = step_bench.MODELS[name]
    task = Task(kind, {**SMALL, **layers}, "fp32", (9, 31, 2, 17), "cpu", tmp_path)
    assert task.feeds() == (("padded",) if name == "gdn" else ("padded", "masked"))
    sides = {feed: theirs(task, feed) for feed in task.feeds()} | {"ours": ours(task)}
    found = {who: each_gradient(side) for who, side in sides.items()}
    for who in task.feeds():
        assert found[who][0] == pytest.approx(found["ours"][0], rel=1e-6)
        # Gradients, which differ by percents where a token sees another document: the loss of random weights hardly does.
        assert found[who][1] == pytest.approx(found["ours"][1], rel=1e-5)


def each_gradient(side: Trained) -> tuple[float, float]:
    """The loss, and the norm of its gradient by the embedding."""
    loss = side.loss()
    loss.backward()
    (embedding,) = (p for p in side.model.parameters() if p.shape == (SMALL["vocabulary"], SMALL["width"]))
    assert embedding.grad is not None
    return loss.item(), embedding.grad.norm().item()


class Side:
    """Stands in for a process with a model."""

    def __init__(self, loss: float, seconds: float = 1.0):
        self.answers = {"loss": loss, "step": seconds, "memory": 7, "parameters": 5}

    def ask(self, what: str) -> Any:
        return self.answers[what]


def test_other_weights_are_noticed() -> None:
    with pytest.raises(SystemExit, match=r"llama: the models differ by 1.0e-02 in their loss"):
        step_bench.measure({"ours": Side(4.04), "padded": Side(4.0)}, "llama", 1)  # type: ignore[dict-item]


def test_the_ratio_is_how_many_times_longer_the_peer_takes() -> None:
    sides = {"padded": Side(4.0, 6.0), "masked": Side(4.0, 5.0), "ours": Side(4.0, 2.0)}
    found = step_bench.measure(sides, "llama", 3)  # type: ignore[arg-type]
    assert found["ratio"] == 2.5 and found["feed"] == "masked"  # the peer at its best
    assert found["seconds"] == {"padded": [6.0] * 3, "masked": [5.0] * 3, "ours": [2.0] * 3}


def test_a_side_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ours: Traceback.*theirs"):  # nobody has left weights there
        Worker("ours", Task("llama", SMALL, "fp32", (8,), "cpu", tmp_path), 1, False)
