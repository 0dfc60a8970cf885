"""Training on text that is tokenised on the fly: interrupted and resumed equals uninterrupted, over ranks too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.estimate.report import report
from tests.pretrain.train.small_run import configuration, losses, records, train_on_rank
from tests.ranks import TRAINING, run_ranks


@pytest.fixture(scope="module")
def streamed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("text")
    text = Path(json.__file__).read_text().split("\n\n")
    rows = [json.dumps({"text": f"{number} {part}"}) for number in range(8) for part in text]
    (folder / "a.jsonl").write_text("\n".join(rows))
    source = {"path": f"{folder}/*.jsonl", "name": "text", "weight": 3, "stream": {}, "validation_path": str(corpus)}
    sources = json.dumps([source, {"path": str(corpus)}])
    return (f"data.sources={sources}", f"data.path={folder}/*.jsonl", "train.precision=fp32", "train.steps=4")


def test_resumed_equals_uninterrupted_also_on_other_ranks(
    streamed: tuple[str, ...], corpus: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    alone = (*streamed, "mesh.dp=1")
    assert run_ranks(train_on_rank, 1, whole, corpus, alone, preload=TRAINING) == [0]
    assert run_ranks(train_on_rank, 2, broken, corpus, streamed, 2, preload=TRAINING) == [75] * 2
    middle = json.loads((broken / "checkpoints/step_00000002/meta.json").read_text())["meta"]["data"]
    # Both ranks' lanes stand in it: 3/4 of 8 sequences went round 4 lanes.
    assert middle["streams"]["lanes"] == {"0": 4}
    assert [row[:4] for row in middle["streams"]["positions"]] == [
        [0, 0, lane, number] for lane, number in enumerate((2, 2, 1, 1))
    ]
    assert run_ranks(train_on_rank, 1, broken, corpus, alone, preload=TRAINING) == [0]
    assert losses(broken) == pytest.approx(losses(whole), rel=2e-5) and len(losses(whole)) == 4
    last = [json.loads((run / "checkpoints/step_00000004/meta.json").read_text())["meta"] for run in (whole, broken)]
    assert last[0]["data"] == last[1]["data"]
    assert len(records(whole)[-1]["epochs"]) == 2
    assert set(records(whole, "validation.jsonl")[-1]["sources"]) == {"text", corpus.name}
    assert (whole / "tokenizer.model").read_bytes() == (corpus / "tokenizer.model").read_bytes()


def test_an_estimate_reads_no_text(streamed: tuple[str, ...], corpus: Path, tmp_path: Path) -> None:
    assert "vocabulary" in report(configuration(tmp_path, corpus, *streamed))
    only = [
        f"data.tokenizer={corpus}/tokenizer.model",
        "data.sources=[{path: nowhere, stream: {}}]",
        "data.path=nowhere",
    ]
    assert "vocabulary" in report(configuration(tmp_path, corpus, *only))
