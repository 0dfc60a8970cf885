from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.data import prepare_bench
from pretrain.data.vocabulary import train


def test_text_and_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("a", "one " * 500), ("b", "two\n" * 500), ("c", "one " * 500), ("d", ""), ("e", "é" * 1000)):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "f.txt").write_bytes(b"\xff")
    texts = prepare_bench.texts_of([f"{tmp_path}/*.txt"], 10_000)
    assert [(text[0], len(text.encode())) for text in texts] == [("o", 2000), ("t", 2000), ("é", 2000)]
    assert prepare_bench.texts_of([f"{tmp_path}/*.txt"], 2001) == texts[:2]
    monkeypatch.setattr(prepare_bench, "_SHARD_BYTES", 3000)
    (tmp_path / "jsonl").mkdir()
    prepare_bench.write(texts, tmp_path / "jsonl")
    files = sorted((tmp_path / "jsonl").iterdir())
    read = [[json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()] for path in files]
    assert read == [texts[:2], texts[2:]]
    with pytest.raises(ValueError, match="no text to measure with: name files as --input"):
        prepare_bench.texts_of([f"{tmp_path}/f.txt"], 10)


def test_a_round_times_every_way_and_ratios_are_of_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["def f(x):\n    return x\n" * 20, "import json\n" * 30]
    model = tmp_path / "t.model"
    train(texts, 280, model)
    prepare_bench.write(texts * 1, tmp_path)
    order: list[str] = []

    def noting(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    ways = {"a": lambda: noting("a", 1.0), "b": lambda: noting("b", 2.0)}
    assert prepare_bench.measure(ways, 2) == {"a": [1.0, 1.0], "b": [2.0, 2.0]}
    assert order == ["a", "b", "a", "b"]
    assert prepare_bench._alone(str(model), texts) > 0
    assert prepare_bench._ours(model, texts) > 0
    assert prepare_bench._prepared(model, tmp_path, 1) > 0
    assert not list(tmp_path.glob("tmp*"))

    seconds = {
        "alone": [1.0, 2.0, 9.0],
        "ours": [0.5, 1.0, 8.0],
        "two": [0.5, 1.0, 9.0],
        "one": [1.25, 2.0, 10.0],
        "both": [0.625, 1.0, 2.5],
    }
    prepare_bench._show(seconds, 4_000_000)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["alone", "2.00", "MB/s"],
        ["ours", "4.00", "MB/s", "200%", "of", "the", "library", "alone"],
        ["two", "4.00", "MB/s", "2.00x"],
        ["one", "2.00", "MB/s", *["90%", "of", "the", "library", "alone,", "50%", "of", "the", "tokenizer", "alone"]],
        ["both", "4.00", "MB/s", "2.00x", "of", "one", "process"],
    ]
