"""The bench of whole steps: small models of its three kinds, with figures that can be checked without a clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import step_bench

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


def test_a_step_trains_both_alike(small: None) -> None:
    ours, theirs = step_bench.pair("llama", "cpu", 40)
    ids = torch.randint(0, 61, (2, 41), generator=torch.Generator().manual_seed(3))
    step, _ = step_bench.steps(ours, theirs, ids, "fp32")
    losses = {who: [step[who]() for _ in range(4)] for who in step}
    # Both decay all matrices but the (tied) embedding, which theirs decays, too: by 3e-5 of itself a step.
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-4)
    assert losses["ours"][3] < losses["ours"][0]


def test_other_weights_are_noticed(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made = step_bench.pair

    def off(*arguments: Any) -> Any:
        ours, theirs = made(*arguments)
        with torch.no_grad():
            next(ours.parameters()).mul_(1.5)
        return ours, theirs

    monkeypatch.setattr(step_bench, "pair", off)
    with pytest.raises(SystemExit, match=r"differ by .* in their loss"):
        step_bench.main(
            ["--models", "llama", "--length", "20", "--rounds", "1", "--precision", "fp32", "--device", "cpu"]
        )
