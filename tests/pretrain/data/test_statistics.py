from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from pretrain.data.__main__ import main
from pretrain.data.statistics import of_paths, statistics, tables_of
from pretrain.data.store import Corpus
from pretrain.data.writer import PairWriter


def pair(prefix: Path, lengths: list[int]) -> Path:
    with PairWriter(prefix, np.uint16) as writer:
        for length in lengths:
            writer.add(np.full(length, 7, np.uint16), np.array([length]))
    return prefix


def test_a_pair_whose_numbers_are_known(tmp_path: Path) -> None:
    lengths = [1, 2, 3, 4, 4, 5, 7, 8, 1000, 1 << 20, (1 << 20) + 5]
    found = statistics(Corpus.open(pair(tmp_path / "known", lengths)), "known", weight=0.25)
    assert (found.documents, found.tokens, found.bytes, found.bytes_per_token) == (11, sum(lengths), None, None)
    assert found.lengths == {
        "least": 1, "p10": 2, "median": 5, "p90": 1 << 20, "p99": (1 << 20) + 5,
        "mean": round(sum(lengths) / 11, 2), "most": (1 << 20) + 5,
    }  # fmt: skip
    filled = [row for row in found.histogram if row[1]]
    assert filled == [(1, 1, 1), (2, 2, 5), (4, 4, 20), (8, 1, 8), (512, 1, 1000), (1 << 20, 2, (2 << 20) + 5)]
    assert [row[0] for row in found.histogram] == [2**power for power in range(21)]
    assert found.spread == []
    assert found.weight == 0.25


def test_lengths_as_numpy_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.data.statistics._BLOCK", 7)  # many blocks
    monkeypatch.setattr("pretrain.data.statistics._COUNTED", 50)  # and many lengths that are kept
    lengths = np.random.default_rng(0).integers(1, 100, 100)
    found = statistics(Corpus.open(pair(tmp_path / "drawn", lengths.tolist())), "drawn")
    ranks = {"p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99}
    expected = {key: int(np.quantile(lengths, share, method="inverted_cdf")) for key, share in ranks.items()}
    assert {key: found.lengths[key] for key in ranks} == expected
    assert found.lengths["mean"] == round(float(lengths.mean()), 2)
    assert sum(row[1] for row in found.histogram) == 100
    assert sum(row[2] for row in found.histogram) == lengths.sum()


def test_a_prepared_corpus(prepared: Path, tmp_path: Path) -> None:
    train, validation = of_paths([str(prepared)], None)
    manifest = json.loads((prepared / "manifest.json").read_text())["splits"]
    for found, split in ((train, "train"), (validation, "validation")):
        assert (found.name, found.split) == (prepared.name, split)
        assert (found.documents, found.tokens, found.bytes) == tuple(
            manifest[split][key] for key in ("documents", "tokens", "bytes")
        )
        assert found.bytes_per_token == manifest[split]["bytes_per_token"]
        assert found.lengths["most"] == manifest[split]["longest_document"]
        assert len(found.spread) == found.documents
        assert found.spread[0] <= found.bytes_per_token <= found.spread[-1]
    # A bare pair has no manifest: its bytes are those of its tokens, which are the same.
    bare = next(iter(of_paths([str(prepared / "train")], str(prepared / "tokenizer.model"))))
    assert (bare.bytes, bare.spread, bare.histogram) == (train.bytes, train.spread, train.histogram)
    sizes, lengths = tables_of([train, validation])
    assert [next(iter(column.cells)) for column in sizes.columns][2:5] == [
        f"{train.documents:,}",
        f"{train.tokens:,}",
        "100.0%",
    ]
    assert [str(column.header) for column in lengths.columns][2:] == [
        "least",
        "p10",
        "median",
        "p90",
        "p99",
        "mean",
        "most",
    ]


def test_the_command(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = pair(tmp_path / "other", [3, 3, 0, 9])
    plot, numbers = tmp_path / "picture.svg", tmp_path / "numbers.json"
    assert main(["statistics", str(prepared), str(other), "--plot", str(plot), "--json", str(numbers)]) == 0
    out = capsys.readouterr().out
    assert "other, train: documents by length (tokens)" in out
    assert "          0 to           0           1   0.0% of the tokens" in out
    assert f"wrote {plot}" in out
    rows = json.loads(numbers.read_text())
    assert [(row["name"], row["split"]) for row in rows] == [
        (prepared.name, "train"), (prepared.name, "validation"), ("other", "train"),
    ]  # fmt: skip
    assert rows[2]["histogram"] == [[0, 1, 0], [1, 0, 0], [2, 2, 6], [4, 0, 0], [8, 1, 9]]
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
    assert len(list(ElementTree.parse(plot).iter())) > 200


def test_a_run_and_its_weights(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = pair(tmp_path / "other", [30] * 10)
    sources = f"[{{path: {prepared}, weight: 3, name: a}}, {{path: {other}, weight: 1, name: b}}]"
    numbers = tmp_path / "numbers.json"
    run = [
        "--config",
        "configs/runs/quickstart.yaml",
        f"data.path={prepared}",
        f"data.sources={sources}",
    ]
    code = main(["statistics", *run, "--json", str(numbers)])
    assert code == 0, capsys.readouterr().err
    rows = json.loads(numbers.read_text())
    assert [(row["name"], row["weight"], row["split"]) for row in rows] == [("a", 0.75, "train"), ("b", 0.25, "train")]
    assert "weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "takes folders or prefixes, or the configuration of a run as --config"),
        (["x", "--config", "y"], "takes folders or prefixes, or the configuration of a run as --config"),
        (["x", "--plot", "a.txt"], "a picture ends in .png, .svg or .pdf"),
        (["x", "--plot", "/nowhere/at/all.png"], "there is no folder /nowhere/at"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["statistics", *arguments]) == 2
    assert message in capsys.readouterr().err
