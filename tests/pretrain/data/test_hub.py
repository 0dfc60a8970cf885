"""Hugging Face datasets, from local folders: memory-mapped and streamed, the same documents as their files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.data import hub
from pretrain.data.__main__ import main
from pretrain.data.errors import DataError
from pretrain.data.hub import HubDataset
from pretrain.data.manifest import read
from pretrain.data.options import PrepareOptions
from pretrain.data.prepare import run
from pretrain.data.sources import Reading
from pretrain.data.units import documents_of, plan
from tests.pretrain.data.test_prepare import contents, texts

datasets = pytest.importorskip("datasets")

TEXTS = [f"document {i} " + "é wort " * (i % 5) for i in range(90)]
TAGS = ["en" if i % 3 else "de" for i in range(90)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`saved` by save_to_disk in three files, `splits` with two splits, `files` of two parquet files."""
    folder = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    found = datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(90)), "lang": TAGS})
    found.save_to_disk(str(folder / "saved"), num_shards=3)
    both = datasets.DatasetDict({"train": found.select(range(60)), "test": found.select(range(60, 90))})
    both.save_to_disk(str(folder / "splits"))
    (folder / "files").mkdir()
    for part, first in (("a", 0), ("b", 45)):
        found.select(range(first, first + 45)).to_parquet(str(folder / "files" / f"train-{part}.parquet"))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub._opened.cache_clear()
    yield
    hub._opened.cache_clear()


@pytest.fixture
def options(prepared: Path, tmp_path: Path) -> Callable[..., PrepareOptions]:
    def call(dataset: HubDataset, name: str = "out", **changes: Any) -> PrepareOptions:
        given: dict[str, Any] = {"tokenizer": prepared / "tokenizer.model", "validation": 0.0, "workers": 1}
        return PrepareOptions([], tmp_path / name, datasets=[dataset], **{**given, "shuffle": False, **changes})

    return call


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["saved", "files"])
def test_every_row_is_in_one_unit(folders: Path, name: str, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_BATCH_ROWS", 1 if name == "saved" else 7)
    dataset = HubDataset(str(folders / name), streaming=streaming)
    units = plan([], [dataset], 500)
    assert [text for unit in units for text in documents_of(unit, Reading())] == TEXTS
    assert len(units) == ({"saved": 3, "files": 2}[name] if streaming else len(units))
    assert len(units) >= 2
    if not streaming:
        assert len(plan([], [dataset])) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_a_corpus_of_a_dataset(
    folders: Path, options: Callable[..., PrepareOptions], tmp_path: Path, streaming: bool
) -> None:
    dataset = HubDataset(str(folders / "saved"), streaming=streaming)
    done = run(options(dataset, unit_bytes=800))
    assert texts(tmp_path / "out", "train") == [text.encode() for text in TEXTS]
    assert done.manifest is not None
    assert done.manifest.settings["datasets"][0]["name"] == str(folders / "saved")
    for shard in (1, 2):
        run(options(dataset, "shards", unit_bytes=800, shard=(shard, 2), workers=3 - shard if streaming else 1))
    assert main(["merge", "--output", f"{tmp_path}/shards"]) == 0
    assert contents(tmp_path / "shards") == contents(tmp_path / "out")


def test_the_tokenizer_is_trained_on_the_dataset(
    folders: Path, options: Callable[..., PrepareOptions], tmp_path: Path
) -> None:
    dataset = HubDataset(str(folders / "saved"))
    run(options(dataset, tokenizer=None, vocabulary=300, validation=0.2))
    manifest = read(tmp_path / "out")
    assert manifest.tokenizer.trained
    assert manifest.splits["validation"].documents + manifest.splits["train"].documents == 90


def test_the_command_line(folders: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prepare", "--dataset", str(folders / "splits"), "--split", "test", "--output", f"{tmp_path}/out"]
    words += ["--tokenizer", f"{prepared}/tokenizer.model", "--validation", "0", "--workers", "1", "--no-shuffle"]
    words += ["--language", "en", "--language-field", "lang"]
    assert main(words) == 0
    kept = [text.encode() for text, tag in zip(TEXTS[60:], TAGS[60:]) if tag == "en"]
    assert texts(tmp_path / "out", "train") == kept
    out = capsys.readouterr().out
    assert f"{folders}/splits (test) in " in out
    assert f"left out: {30 - len(kept)} language" in out


@pytest.mark.parametrize(
    ("name", "changes", "code", "expected"),
    [
        ("saved", {"--split": "test"}, 2, "was saved without splits; leave --split out"),
        ("splits", {"--split": "dev"}, 2, "has the splits train, test; pass one as --split"),
        ("files", {"--split": "test"}, 2, "Unknown split"),
        ("files:cfg", {}, 2, "BuilderConfig 'cfg' not found"),
        ("saved", {"--text-field": "body"}, 2, "has no field 'body'; its fields are: lang, n, text"),
        ("saved", {"--text-field": "n"}, 77, "row 1: field 'n' holds int, not text"),
        ("none", {}, 77, "cannot be reached"),
        ("nobody/none:cfg", {}, 77, "cannot be reached: Couldn't reach 'nobody/none' on the Hub"),
        ("nobody/none", {"--streaming": None}, 77, "without a network, or with HF_HUB_OFFLINE, only what is already"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(
    folders: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    name: str, changes: dict[str, str | None], code: int, expected: str,
) -> None:  # fmt: skip
    where = f"{folders}/{name}" if (folders / name.split(":")[0]).exists() else name
    words = ["prepare", "--dataset", where, "--output", f"{tmp_path}/out", "--workers", "1"]
    words += ["--tokenizer", f"{prepared}/tokenizer.model", "--validation", "0"]
    words += [word for pair in changes.items() for word in pair if word is not None]
    assert main(words) == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    assert expected in error
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.parts").exists()


def test_names() -> None:
    assert HubDataset.parse("a/b:c", "test", True, "v1") == HubDataset("a/b", "c", "test", True, "v1")
    assert HubDataset.parse("a/b") == HubDataset("a/b")
    assert str(HubDataset("a/b", "c")) == "dataset a/b:c (train)"
    for text in ("", "a:", ":c"):
        with pytest.raises(ValueError, match="names nothing: pass NAME, NAME:CONFIG or a folder"):
            HubDataset.parse(text)


def test_a_dataset_that_breaks_off(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that ends in an error, as one over a network may, is named or counted; so are rows of a damaged file."""
    stream = HubDataset(str(folders / "saved"), streaming=True)

    class Breaking:
        num_shards = 2
        column_names = None

        def shard(self, num_shards: int, index: int) -> Iterator[dict[str, str]]:
            yield {"text": f"{index}"}
            if index:
                raise OSError("connection reset")

    monkeypatch.setattr(HubDataset, "open", lambda self: Breaking())
    units = plan([], [stream])
    with pytest.raises(
        DataError, match=r"shard 1 is not readable after 1 rows: OSError: connection reset; run the same"
    ):
        [text for unit in units for text in documents_of(unit, Reading())]
    reading = Reading(skip_bad=True)
    assert [text for unit in units for text in documents_of(unit, reading)] == ["0", "1"]
    assert reading.undecodable == 1
