"""Units of work: cut by the input alone, committed one by one, found again by the next run, refused with other settings."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from pretrain.data import encode
from pretrain.data import prepare as preparing
from pretrain.data.encode import Work, make_unit
from pretrain.data.errors import DataError, PrepareFailure
from pretrain.data.manifest import read
from pretrain.data.options import PrepareOptions
from pretrain.data.parts import TABLE, Parts, UnitRecord, differences, folder_of, run_file
from pretrain.data.prepare import Done, prepare, run
from pretrain.data.report import amounts
from pretrain.data.sources import Reading
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.units import Unit, documents_of, plan, unit_bytes_for
from tests.pretrain.data.test_prepare import contents, everything

ROWS = [f"row {i}\n" * (1 + i % 7) + "é" * (i % 3) for i in range(120)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """ROWS as JSON lines, with blank lines and both kinds of line breaks, and without one at the end."""
    lines = [json.dumps({"text": text, "n": i}, ensure_ascii=i % 2 == 0) for i, text in enumerate(ROWS)]
    for i in range(0, len(lines), 11):
        lines[i] += "\r" if i % 2 else "\n"
    (tmp_path / "rows.jsonl").write_bytes("\n".join(lines).encode())
    return tmp_path / "rows.jsonl"


@pytest.fixture
def options(prepared: Path, tmp_path: Path, rows: Path) -> Callable[..., PrepareOptions]:
    def call(**changes: Any) -> PrepareOptions:
        given: dict[str, Any] = {"tokenizer": prepared / "tokenizer.model", "validation": 0.2, "workers": 1}
        given |= {"unit_bytes": 700, "output": tmp_path / "out", **changes}
        return PrepareOptions([str(rows)], **given)

    return call


def files_of(*paths: Path) -> list[tuple[Path, str, int]]:
    form = {".jsonl": "jsonl", ".parquet": "parquet"}
    return [(path, form.get(path.suffix, "text"), path.stat().st_size) for path in paths]


def test_units_have_a_bounded_size() -> None:
    assert [unit_bytes_for(total) for total in (0, 10**6, 128 * 10**6, 10**12)] == [10**6, 10**6, 2 * 10**6, 32 * 10**6]


@pytest.mark.parametrize("unit_bytes", [1, 7, 50, 333, 1000, 10**9])
def test_every_row_is_in_one_unit_wherever_it_is_cut(rows: Path, unit_bytes: int) -> None:
    units = plan(files_of(rows), (), unit_bytes)
    assert [unit.number for unit in units] == list(range(len(units)))
    assert len({unit.key for unit in units}) == len(units) == -(-rows.stat().st_size // unit_bytes)
    assert [text for unit in units for text in documents_of(unit, Reading())] == ROWS


@pytest.mark.parametrize("unit_bytes", [1, 500, 1500, 10**9])
def test_row_groups_are_shared_out(tmp_path: Path, unit_bytes: int) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": list(range(120)), "text": ROWS}), path, row_group_size=13)
    units = plan(files_of(path), (), unit_bytes)
    assert [text for unit in units for text in documents_of(unit, Reading())] == ROWS
    slices = [(part.first, part.last) for unit in units for part in unit.slices]
    assert slices == [(0, None)] if unit_bytes == 10**9 else len(slices) > 1
    if unit_bytes == 1:
        assert slices == [(i, i + 1) for i in range(10)]


def test_small_files_share_a_unit(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"{i}" * 100)
    files = files_of(*sorted(tmp_path.iterdir()))
    units = plan(files, (), 350)
    assert [len(unit.slices) for unit in units] == [3, 3, 3, 1]
    assert [text[0] for unit in units for text in documents_of(unit, Reading())] == list("0123456789")
    assert [unit.key for unit in plan(files[:9], (), 350)] == [unit.key for unit in units[:3]]


def test_a_run_is_sorted_and_holds_each_document(tmp_path: Path, rows: Path, prepared: Path) -> None:
    (unit,) = plan(files_of(rows))
    tokenizer = Tokenizer(prepared / "tokenizer.model")
    record = make_unit(unit, Work(tmp_path / "parts", Reading(), 5, 0.3), tokenizer)
    parts = Parts(tmp_path / "parts")
    assert parts.finished(unit.key) == record
    table = np.fromfile(run_file(parts.unit_folder(unit.key), 0, "table"), TABLE)
    ids = np.fromfile(run_file(parts.unit_folder(unit.key), 0, "tokens"), np.uint16)
    assert (np.diff(table["key"].astype(object)) > 0).all()
    ends = np.cumsum(table["tokens"])
    found = {
        int(row["place"]): tokenizer.decode(ids[end - row["tokens"] : end].tolist()) for row, end in zip(table, ends)
    }
    assert [found[place] for place in range(len(ROWS))] == ROWS
    held = b"".join(found[int(row["place"])].encode() for row in table if row["flags"])
    assert held == run_file(parts.unit_folder(unit.key), 0, "text").read_bytes()
    assert 10 < (table["flags"] == 1).sum() < 70


def test_a_unit_is_several_runs_if_it_is_large(
    options: Callable[..., PrepareOptions], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prepare(options(unit_bytes=10**9))
    monkeypatch.setattr(encode, "RUN_DOCUMENTS", 7)
    made: list[UnitRecord] = []
    monkeypatch.setattr(encode, "make_unit", lambda *given: made.append(make_unit(*given)) or made[-1])
    prepare(options(unit_bytes=10**9, output=tmp_path / "runs"))
    assert [run.documents for run in made[0].runs] == [7] * 17 + [1]
    assert contents(tmp_path / "runs") == contents(tmp_path / "out")


def stopping_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The next runs are interrupted after so many units."""
    made: list[Unit] = []

    def make(unit: Unit, *others: Any) -> UnitRecord:
        if len(made) == count:
            raise KeyboardInterrupt
        made.append(unit)
        return make_unit(unit, *others)

    monkeypatch.setattr(encode, "make_unit", make)


def test_no_finished_unit_is_made_again(
    options: Callable[..., PrepareOptions], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = run(options(output=tmp_path / "whole"))
    assert (whole.found, whole.made) == (0, whole.units)
    assert whole.units > 8
    with monkeypatch.context() as patched:
        stopping_after(patched, 5)
        with pytest.raises(KeyboardInterrupt, match=f"5 of {whole.units} units are finished and kept in"):
            run(options())
        assert not (tmp_path / "out").exists()
    again = run(options())
    assert (again.units, again.found, again.made, again.again) == (whole.units, 5, whole.units - 5, 0)
    assert str(again) == f"{whole.units} units: {whole.units - 5} made, 5 found finished"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not folder_of(tmp_path / "out").exists()


@pytest.mark.parametrize("moment", ["before", "within", "after", "tidying"])
def test_a_merge_that_is_killed(
    options: Callable[..., PrepareOptions], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moment: str
) -> None:
    class Killed(BaseException):
        pass

    def killed(*given: object, **_: object) -> None:
        if moment == "tidying":
            parts = given[0]
            assert isinstance(parts, Parts)
            shutil.rmtree(parts.folder / "units", ignore_errors=True)
            (parts.folder / "plan.json").unlink(missing_ok=True)
        raise Killed

    place = {"before": "pretrain.data.prepare.assemble", "within": "pretrain.data.assemble._describe"}
    with monkeypatch.context() as patched:
        patched.setattr(place.get(moment, "pretrain.data.parts.Parts.discard"), killed)
        with pytest.raises(Killed):
            run(options())
    parts = folder_of(tmp_path / "out")
    assert parts.is_dir()
    assert (tmp_path / "out").is_dir() == (moment in ("after", "tidying"))
    done = run(options())
    assert (done.found, done.made) == (done.units, 0)  # of a folder half removed nobody counts the units
    assert done.manifest == read(tmp_path / "out")
    assert not parts.exists()
    run(options(output=tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def interrupted(options: PrepareOptions, monkeypatch: pytest.MonkeyPatch, count: int = 3) -> None:
    with monkeypatch.context() as patched:
        stopping_after(patched, count)
        with pytest.raises(KeyboardInterrupt):
            run(options)


def test_other_settings_are_refused_with_what_differs(
    options: Callable[..., PrepareOptions], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupted(options(), monkeypatch)
    with pytest.raises(
        ValueError, match=r"other settings \(seed was 0, is 1; validation was 0.2, is 0.1\): go on with"
    ):
        run(options(seed=1, validation=0.1))
    with pytest.raises(ValueError, match="unit_bytes was 700, is 900"):
        run(options(unit_bytes=900))
    done = run(options(seed=1, validation=0.1, restart=True))
    assert done.found == 0
    assert done.manifest is not None
    assert done.manifest.settings["seed"] == 1
    assert differences({"a": 1, "on_bad": "error", "c": (1,)}, {"b": 2, "on_bad": "skip", "c": [1]}) == [
        "a was 1, is None",
        "b was None, is 2",
    ]


def test_another_tokenizer_is_refused_by_its_hash(
    options: Callable[..., PrepareOptions], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text_folder: Path
) -> None:
    interrupted(options(), monkeypatch)
    prepare(PrepareOptions([f"{text_folder}/*.py"], tmp_path / "other", vocabulary=400, workers=1))
    with pytest.raises(ValueError, match=r"encoded with another tokenizer \(xxh3_128 [0-9a-f]{32}, now [0-9a-f]{32}\)"):
        run(options(tokenizer=tmp_path / "other" / "tokenizer.model"))
    with pytest.raises(ValueError, match=r"trained was None, is .'vocabulary': 4096"):
        run(options(tokenizer=None))
    model = folder_of(tmp_path / "out") / "tokenizer.model"
    raw = bytearray(model.read_bytes())
    raw[1000] ^= 4
    model.write_bytes(raw)
    with pytest.raises(DataError, match=r"tokenizer.model is damaged: its hash is not that of the record"):
        run(options())


def test_a_trained_tokenizer_is_kept(
    options: Callable[..., PrepareOptions], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text_folder: Path
) -> None:
    given = [f"{text_folder}/*.py"]
    trained = PrepareOptions(given, tmp_path / "out", vocabulary=400, workers=1, unit_bytes=100_000)
    interrupted(trained, monkeypatch, 1)
    with monkeypatch.context() as patched:
        patched.setattr(preparing, "train", lambda *_, **__: pytest.fail("trained again"))
        assert run(trained).found == 1


def test_units_of_files_that_have_changed_are_made_again(
    options: Callable[..., PrepareOptions], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prepared: Path
) -> None:
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    given: dict[str, Any] = {
        "tokenizer": prepared / "tokenizer.model",
        "validation": 0.0,
        "workers": 1,
        "unit_bytes": 1,
    }
    asked = PrepareOptions([f"{tmp_path}/*.txt"], tmp_path / "out", **given)
    interrupted(asked, monkeypatch, 4)
    (tmp_path / "1.txt").write_text("DOCUMENT 1")  # of the same size
    os.utime(tmp_path / "1.txt", ns=(0, 0))
    (tmp_path / "2.txt").write_text("a longer document 2")
    done = run(asked)
    assert (done.units, done.found, done.made, done.again) == (6, 2, 4, 1)
    texts = {b"document 0", b"DOCUMENT 1", b"a longer document 2", b"document 3", b"document 4", b"document 5"}
    assert set(everything(tmp_path / "out")) == texts
    assert "4 made (1 of them again, because files have changed), 2 found finished" in str(done)


def test_on_bad_may_change_between_runs(options: Callable[..., PrepareOptions], tmp_path: Path, prepared: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.txt").write_bytes(f"document {i}".encode() if i != 2 else b"\xff")
    given: dict[str, Any] = {
        "tokenizer": prepared / "tokenizer.model",
        "validation": 0.0,
        "workers": 1,
        "unit_bytes": 1,
    }
    with pytest.raises(DataError, match=r"2.txt is not UTF-8 .* skip`. 2 of 4 units are finished and kept in"):
        run(PrepareOptions([f"{tmp_path}/*.txt"], tmp_path / "out", **given))
    skip = PrepareOptions([f"{tmp_path}/*.txt"], tmp_path / "out", on_bad="skip", shard=(1, 1), **given)
    done = run(skip)
    assert (done.found, done.made) == (2, 2)
    assert len(done.notes) == 1
    assert "2.txt is not UTF-8" in done.notes[0]
    with pytest.raises(DataError, match="not UTF-8"):  # what was skipped is an error again
        run(PrepareOptions([f"{tmp_path}/*.txt"], tmp_path / "out", shard=(1, 1), **given))


def test_truncated_units_are_made_again(
    options: Callable[..., PrepareOptions], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupted(options(), monkeypatch, 5)
    units = sorted((folder_of(tmp_path / "out") / "units").iterdir())
    tokens = run_file(units[0], 0, "tokens")
    tokens.write_bytes(tokens.read_bytes()[:-1])
    (units[1] / "record.json").write_text("{")
    run_file(units[2], 0, "text").unlink()
    done = run(options())
    assert (done.found, done.again) == (2, 3)
    run(options(output=tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_only_one_process_at_a_time(options: Callable[..., PrepareOptions], tmp_path: Path) -> None:
    with (
        Parts(folder_of(tmp_path / "out")).locked("1-of-1"),
        pytest.raises(PrepareFailure, match="another process is at"),
    ):
        run(options())
    assert isinstance(run(options()), Done)


def test_progress_in_words() -> None:
    assert amounts(0, 0, 0, 0.0) == ""
    assert amounts(0, 0, 0, 5.0, "3 of 9 units") == "3 of 9 units"
    assert amounts(5_000_000, 25_000_000, 0, 1.0) == "5.0 of 25.0 MB"
    # Units that were found finished are no speed: 4 MB of the 5 were made in these 2 seconds.
    assert amounts(5_000_000, 25_000_000, 4_000_000, 2.0, "2 of 9 units") == (
        "2 of 9 units, 5.0 of 25.0 MB, 2.0 MB/s, 0:00:10 left"
    )
    assert amounts(10**9, 10**11, 10**9, 100.0).endswith("10.0 MB/s, 2:45:00 left")
