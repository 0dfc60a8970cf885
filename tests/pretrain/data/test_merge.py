"""Merging: the same bytes whatever made the units, each document once, in an order that the seed and the content decide."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.data import merge as merging
from pretrain.data.__main__ import main
from pretrain.data.assemble import merge
from pretrain.data.encode import digest_of, key_of
from pretrain.data.errors import DataError, PrepareFailure
from pretrain.data.filters import Filters
from pretrain.data.manifest import read
from pretrain.data.options import PrepareOptions
from pretrain.data.parts import Parts, folder_of
from pretrain.data.prepare import prepare, run
from tests.pretrain.data.test_prepare import contents, everything, texts


def documents(seed: int, count: int = 80) -> list[str]:
    """Of many lengths, a tenth of them twice or more often."""
    chance = random.Random(seed)
    found = [f"{i}: " + "word " * chance.randrange(30) + "ü" * (i % 2) for i in range(count)]
    return [found[chance.randrange(i + 1)] if i and chance.random() < 0.1 else found[i] for i in range(count)]


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Three files of rows, a folder of texts."""
    for i in range(3):
        lines = [json.dumps({"text": text, "lang": ["en", "de", "fr"][n % 3]}) for n, text in enumerate(documents(i))]
        (tmp_path / f"{i}.jsonl").write_text("\n".join(lines))
    for i, text in enumerate(documents(9, 20)):
        (tmp_path / f"t{i:02}.txt").write_text(text)
    return [f"{tmp_path}/*.jsonl", f"{tmp_path}/t*.txt"]


@pytest.fixture
def options(prepared: Path, tmp_path: Path, inputs: list[str]) -> Callable[..., PrepareOptions]:
    def call(name: str = "out", **changes: Any) -> PrepareOptions:
        given: dict[str, Any] = {"tokenizer": prepared / "tokenizer.model", "validation": 0.2, "workers": 1, "seed": 4}
        return PrepareOptions(inputs, tmp_path / name, **{**given, "unit_bytes": 5000, **changes})

    return call


def all_documents() -> list[bytes]:
    """In the order of the input, each once."""
    found = [text for i in range(3) for text in documents(i)] + documents(9, 20)
    return [text.encode() for text in dict.fromkeys(found)]


def test_documents_lie_in_the_order_of_their_keys(options: Callable[..., PrepareOptions], tmp_path: Path) -> None:
    manifest = prepare(options())
    wanted = sorted(all_documents(), key=lambda raw: key_of(digest_of(raw), 4))
    assert everything(tmp_path / "out") == sorted(wanted)
    for split in ("train", "validation"):
        found = texts(tmp_path / "out", split)
        assert found == [raw for raw in wanted if raw in set(found)]
    assert b"".join(texts(tmp_path / "out", "validation")) == (tmp_path / "out" / "validation_text.bin").read_bytes()
    assert manifest.dropped["duplicate"] == 260 - len(wanted)
    assert manifest.settings["shuffle"] is True
    before = texts(tmp_path / "out", "train")
    prepare(options(seed=5, overwrite=True))
    again = texts(tmp_path / "out", "train")
    shared = set(before) & set(again)
    assert [raw for raw in before if raw in shared] != [raw for raw in again if raw in shared]


def test_the_order_of_the_input_can_be_kept(options: Callable[..., PrepareOptions], tmp_path: Path) -> None:
    prepare(options(shuffle=False))
    for split in ("train", "validation"):
        found = texts(tmp_path / "out", split)
        assert found == [raw for raw in all_documents() if raw in set(found)]
    assert everything(tmp_path / "out") == sorted(all_documents())
    assert b"".join(texts(tmp_path / "out", "validation")) == (tmp_path / "out" / "validation_text.bin").read_bytes()


@pytest.mark.parametrize("shuffle", [True, False])
def test_neither_units_nor_workers_nor_ranges_change_a_byte(
    options: Callable[..., PrepareOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffle: bool
) -> None:
    prepare(options("one", shuffle=shuffle, unit_bytes=10**9))
    for name, changes in {"a": {"unit_bytes": 1000}, "b": {"workers": 2}}.items():
        prepare(options(name, shuffle=shuffle, **changes))
        assert contents(tmp_path / name) == contents(tmp_path / "one")
    monkeypatch.setattr(merging, "RANGE_BYTES", 2000)
    monkeypatch.setattr(merging, "_SLICES", 3)
    prepare(options("c", shuffle=shuffle))
    assert contents(tmp_path / "c") == contents(tmp_path / "one")


@pytest.mark.parametrize("apart", [False, True])
def test_shards_merge_to_what_one_run_writes(
    options: Callable[..., PrepareOptions], tmp_path: Path, apart: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(options("whole", near_duplicates=0.6))
    names = [f"out{i}" if apart else "out" for i in range(1, 4)]
    units = [run(options(name, near_duplicates=0.6, shard=(i, 3))).made for i, name in enumerate(names, 1)]
    assert sum(units) == done.units
    assert max(units) - min(units) <= 1
    assert not (tmp_path / "out").exists()
    words = [word for name in dict.fromkeys(names) for word in ("--parts", f"{tmp_path}/{name}.parts")]
    assert main(["merge", "--output", f"{tmp_path}/out", *(words if apart else [])]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob("*.parts"))
    assert "python -m pretrain.data inspect" in capsys.readouterr().out


def test_shards_that_do_not_fit_are_refused(options: Callable[..., PrepareOptions], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"out.parts holds no units; make them with"):
        merge([folder_of(tmp_path / "out")], tmp_path / "out")
    run(options(shard=(1, 2)))
    run(options("other", shard=(2, 2), seed=5))
    parts = [folder_of(tmp_path / name) for name in ("out", "other")]
    with pytest.raises(
        DataError, match=r"units are missing \(.*0.jsonl \[\d+:\d+\], .*\): prepare the shards that lack"
    ):
        merge(parts[:1], tmp_path / "out")
    with pytest.raises(
        ValueError, match="cannot be merged: seed was 4, is 5; prepare all shards with the same command"
    ):
        merge(parts, tmp_path / "out")
    run(options("other", shard=(2, 2), restart=True))
    with Parts(parts[1]).locked("2-of-2"), pytest.raises(PrepareFailure, match="another process is at work"):
        merge(parts, tmp_path / "out")
    (tmp_path / "t20.txt").write_text("one more")
    run(options("third", shard=(2, 2)))
    with pytest.raises(ValueError, match="the input files were not the same"):
        merge([parts[0], folder_of(tmp_path / "third")], tmp_path / "out")
    merge(parts, tmp_path / "out", keep=True)
    assert all(part.is_dir() for part in parts)
    with pytest.raises(ValueError, match="is not empty; pass `--overwrite`"):
        merge(parts, tmp_path / "out")
    before = contents(tmp_path / "out")
    merge(parts, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("kind", ["table", "tokens", "text", "signatures"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_flipped_bit_in_a_unit_is_found(
    options: Callable[..., PrepareOptions], tmp_path: Path, kind: str, shuffle: bool
) -> None:
    run(options(shard=(1, 1), near_duplicates=0.9, shuffle=shuffle))
    units = sorted((folder_of(tmp_path / "out") / "units").glob("*"))
    path = next(path for unit in units for path in unit.glob(f"*.{kind}") if path.stat().st_size > 8)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=f"{path} is damaged: its hash differs .* remove the folder {path.parent} and"):
        merge([folder_of(tmp_path / "out")], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(path.parent)
    assert run(options(near_duplicates=0.9, shuffle=shuffle)).made == 1


def test_the_limit_does_not_depend_on_units_or_workers(options: Callable[..., PrepareOptions], tmp_path: Path) -> None:
    whole = sum(map(len, all_documents()))
    for limit in (1, whole // 3, whole, whole + 1):
        given: dict[str, Any] = {"limit_bytes": limit, "validation": 0.0}
        done = run(options(f"one{limit}", unit_bytes=10**9, **given))
        assert done.manifest is not None
        total = done.manifest.splits["train"].bytes
        assert total == min(total, whole)
        if limit <= whole:
            last = max(map(len, all_documents()))
            assert limit <= total < limit + last
        found = texts(tmp_path / f"one{limit}", "train")
        for workers in (1, 2) if limit == whole // 3 else (1,):
            again = run(options(f"many{limit}{workers}", workers=workers, **given))
            assert texts(tmp_path / f"many{limit}{workers}", "train") == found
            if limit == 1:
                assert again.made == 1


def test_copies_in_other_units_do_not_count_towards_the_limit(
    options: Callable[..., PrepareOptions], tmp_path: Path
) -> None:
    for i in range(40):
        (tmp_path / f"copy{i}.txt").write_text("a" * 1000 if i % 4 else f"{i:04}" * 250)
    asked = options(limit_bytes=3500, validation=0.0, unit_bytes=1)
    asked.input = [f"{tmp_path}/copy*.txt"]
    done = run(asked)
    assert done.manifest is not None
    assert done.manifest.splits["train"].bytes == 4000
    assert 4 <= done.made < 25  # of 40: no more than it takes


def test_near_duplicates_go(options: Callable[..., PrepareOptions], tmp_path: Path) -> None:
    text = " ".join(f"word{i}" for i in range(400))
    rows = [text, "something else altogether, and long enough to be a document", text + " and more", "x " + text]
    for i, row in enumerate(rows):
        (tmp_path / f"near{i}.txt").write_text(row)
    asked = options(near_duplicates=0.8, validation=0.0, unit_bytes=100, shuffle=False)
    asked.input = [f"{tmp_path}/near*.txt"]
    manifest = prepare(asked)
    assert texts(tmp_path / "out", "train") == [rows[0].encode(), rows[1].encode()]
    assert manifest.dropped == {"duplicate": 0, "empty": 0, "unreadable": 0, "near_duplicate": 2}
    assert manifest.settings["near_duplicates"]["threshold"] == 0.8


def test_filters_by_length_and_by_the_language_of_rows(options: Callable[..., PrepareOptions], tmp_path: Path) -> None:
    kept = Filters(min_length=20, max_length=100, language=("en", "fr"), language_field="lang")
    asked = options(filters=kept, validation=0.0, shuffle=False)
    asked.input = [f"{tmp_path}/0.jsonl"]
    manifest = prepare(asked)
    wanted, counts = [], {"too_short": 0, "too_long": 0, "language": 0}
    for n, text in enumerate(documents(0)):
        if len(text) < 20 or len(text) > 100:
            counts["too_short" if len(text) < 20 else "too_long"] += 1
        elif n % 3 == 1:
            counts["language"] += 1
        else:
            wanted.append(text.encode())
    assert texts(tmp_path / "out", "train") == list(dict.fromkeys(wanted))
    assert {name: manifest.dropped[name] for name in counts} == counts
    assert manifest.dropped["duplicate"] == len(wanted) - len(set(wanted))
    assert manifest.settings["filters"] == {
        "min_length": 20, "max_length": 100, "language": ["en", "fr"], "language_field": "lang"
    }  # fmt: skip


def test_filters_hold_for_the_sample_too(options: Callable[..., PrepareOptions], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"abc def {i}"}) for i in range(100)))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": f"{'xyz' * 50} {i}"}) for i in range(100)))
    asked = options(tokenizer=None, vocabulary=290, filters=Filters(max_length=20), validation=0.0)
    asked.input = [f"{tmp_path}/[ab].jsonl"]
    prepare(asked)
    pieces = (tmp_path / "out" / "tokenizer.model").read_bytes()
    assert b"abc" in pieces
    assert b"xyz" not in pieces


def test_bad_usage(options: Callable[..., PrepareOptions]) -> None:
    for changes, message in (
        ({"shard": (0, 2)}, "--shard 0/2: pass 1/N, 2/N"),
        ({"shard": (3, 2)}, "--shard 3/2"),
        ({"shard": (1, 2), "limit_bytes": 5}, "--limit-bytes and --shard together"),
        ({"near_duplicates": 1.5}, "--near-duplicates 1.5: pass a similarity"),
        ({"unit_bytes": 0}, "--unit-bytes 0: pass at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            options(**changes)
    assert main(["prepare", "--input", "x", "--output", "y", "--shard", "2"]) == 2
    assert main(["prepare", "--output", "y"]) == 2


def test_merging_does_not_import_megatron_or_torch(tmp_path: Path) -> None:
    code = "import sys, pretrain.data.report; print(sorted({'torch', 'datasets', 'megatron'} & set(sys.modules)))"
    root = Path(__file__).parents[3]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_manifest_does_not_tell_how_it_was_made(options: Callable[..., PrepareOptions], tmp_path: Path) -> None:
    prepare(options())
    settings = read(tmp_path / "out").settings
    assert not {"unit_bytes", "trained", "workers", "shard", "output"} & set(settings)
