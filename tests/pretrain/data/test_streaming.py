"""Text that is tokenised on the fly: what a lane holds, from any position on, whoever reads it."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from pretrain.data import DataError, Tokenizer
from pretrain.data.errors import UsageError
from pretrain.data.streaming_datasets import Dataset
from pretrain.data.streaming_files import Files, matched
from pretrain.data.streaming_lane import Lane, Position, Recipe, Window, places
from pretrain.data.streaming_readers import Here, Processes
from pretrain.data.streaming_units import Policy, Units
from tests.pretrain.data.texts import NASTY

T = 24
DOCUMENTS = [f"document {i} " + "word " * (i * 7 % 23) + NASTY[i % len(NASTY)] for i in range(180)]


@pytest.fixture(scope="module")
def tokenizer(prepared: Path) -> Tokenizer:
    return Tokenizer(prepared / "tokenizer.model")


def jsonl(path: Path, documents: list[str]) -> Path:
    # Lines of all kinds, and no end of the last one.
    rows = (json.dumps({"text": each, "id": i}) + ("\r" if i % 5 == 0 else "") for i, each in enumerate(documents))
    path.write_bytes("\n \n".join(rows).encode())
    return path


def parquet(path: Path, documents: list[str], group: int = 16) -> Path:
    table = pyarrow.table({"id": list(range(len(documents))), "text": documents})
    pyarrow.parquet.write_table(table, path, row_group_size=group, write_page_checksum=True)
    return path


def files(folder: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> Files:
    """Three files of the documents, in small units."""
    monkeypatch.setattr("pretrain.data.streaming_files.LEAST", 1 << 9)
    monkeypatch.setattr("pretrain.data.streaming_files.ROWS", 5)
    write = {"jsonl": jsonl, "parquet": parquet}
    for number in range(3):
        part = DOCUMENTS[number * 60 : (number + 1) * 60]
        if form == "text":
            for i, each in enumerate(part):
                (folder / f"{number}_{i:02}.txt").write_bytes(each.encode())
        else:
            write[form](folder / f"{number}.{form}", part)
    return Files(matched(folder), "auto", Policy())


def dataset(folder: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    import datasets

    monkeypatch.setattr("pretrain.data.streaming_datasets.ROWS", 16)
    if form == "saved":
        datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(folder / "saved")
        return Dataset(str(folder / "saved"), None, "train", True, Policy())
    for number in range(3):
        jsonl(folder / f"{number}.jsonl", DOCUMENTS[number * 60 : (number + 1) * 60])
    return Dataset(str(folder), None, "train", True, Policy())


MAKE: list[tuple[str, Callable[[Path, str, pytest.MonkeyPatch], Units]]] = [
    ("text", files), ("jsonl", files), ("parquet", files), ("saved", dataset), ("streamed", dataset)
]  # fmt: skip


@pytest.fixture(params=MAKE, ids=[name for name, _ in MAKE])
def units(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Units:
    form, make = request.param
    return make(tmp_path, form, monkeypatch)


def recipe(units: Units, tokenizer: Tokenizer, lanes: int = 2, length: int = T, shuffle: bool = True) -> Recipe:
    return Recipe(units, tokenizer, lanes, length, (7, 0, 0), shuffle)


def take(lane: Lane, count: int) -> list[Window]:
    return [next(lane) for _ in range(count)]


def same(a: Window, b: Window) -> bool:
    parts = np.array_equal(a.ids, b.ids) and np.array_equal(a.begins, b.begins)
    return parts and (a.pieces, a.after, a.bad) == (b.pieces, b.after, b.bad)


def test_all_units_together_hold_every_document_once_and_in_order(units: Units) -> None:
    found = [text for unit in range(units.count) for block in units.blocks(unit, 0) for text in block.texts]
    assert [each.text for each in found] == DOCUMENTS
    assert units.count > 2
    # A unit can be begun at any block.
    for unit in range(units.count):
        blocks = list(units.blocks(unit, 0))
        for first in range(len(blocks) + 1):
            assert [block.texts for block in units.blocks(unit, first)] == [block.texts for block in blocks[first:]]
    again = pickle.loads(pickle.dumps(units))
    assert [block.texts for block in again.blocks(1, 0)] == [block.texts for block in units.blocks(1, 0)]
    assert again.identity == units.identity


def test_lines_that_begin_where_a_unit_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.data.streaming_files.LEAST", 100)
    rows = [json.dumps({"text": f"{number:03}"}).encode() + b"\n" for number in range(64)]
    assert {len(row) for row in rows} == {16}
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows))
    lines = Files(matched(tmp_path), "auto", Policy())
    found = [[int(text.text) for block in lines.blocks(unit, 0) for text in block.texts] for unit in range(lines.count)]
    assert lines.count == 10 and [row for each in found for row in each] == list(range(64)) and min(map(len, found)) > 5
    monkeypatch.setattr("pretrain.data.streaming_files.LEAST", 64)
    lines = Files(matched(tmp_path), "auto", Policy())
    assert [[text.at // 16 for text in next(lines.blocks(unit, 0)).texts] for unit in range(lines.count)] == [
        list(range(first, first + 4)) for first in range(0, 64, 4)
    ]


def test_a_lane_is_its_documents_end_to_end(units: Units, tokenizer: Tokenizer) -> None:
    plain = Lane(recipe(units, tokenizer, 1, shuffle=False), 0, Position())
    ids = [[tokenizer.bos, *tokenizer.encode(each), tokenizer.eos] for each in DOCUMENTS]
    stream = np.array([token for _ in range(2) for each in ids for token in each])
    begins = set(np.cumsum([len(each) for each in ids + ids]).tolist())
    for number in range(len(stream) // T * 5 // 8):  # into the second epoch
        window, first = next(plain), number * T
        assert window.ids.tolist() == stream[first : first + T + 1].tolist() and window.number == number
        assert window.begins.tolist() == [i for i in range(1, T + 1) if first + i in begins]
        at = 0
        for piece in window.pieces:  # where they are from
            text = next(t for b in units.blocks(piece.unit, 0) for t in b.texts if t.at == piece.at).text
            whole = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
            assert len(whole) == piece.size
            assert window.ids[at : at + piece.length].tolist() == whole[piece.start : piece.start + piece.length]
            at += piece.length
        assert at == T


def test_an_epoch_of_all_lanes_has_every_document_once(units: Units, tokenizer: Tokenizer) -> None:
    seen: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    for number in range(2):
        lane = Lane(recipe(units, tokenizer, 2), number, Position())
        before = Position()
        while before.epoch < 2:
            window = next(lane)
            for piece in window.pieces:
                if piece.start == 0 and before.epoch == window.after.epoch:  # not where an epoch ends
                    seen[before.epoch].append((piece.unit, piece.at))
            before = window.after
    for found in seen.values():
        assert len(set(found)) == len(found)
        assert len(DOCUMENTS) - 14 < len(found) <= len(DOCUMENTS)
    assert seen[0] != seen[1]


def test_a_lane_goes_on_from_every_position(units: Units, tokenizer: Tokenizer) -> None:
    for lane in range(2):
        windows = take(Lane(recipe(units, tokenizer), lane, Position()), 300)
        assert windows[-1].after.epoch > 0 or windows[-1].after.place > 0
        for number in random.Random(lane).sample(range(290), 12):
            going_on = take(Lane(recipe(units, tokenizer), lane, windows[number].after), 5)
            assert all(same(a, b) for a, b in zip(windows[number + 1 :], going_on))
            assert [each.number for each in going_on] == list(range(number + 1, number + 6))


def test_lanes_divide_the_units() -> None:
    assert [places(7, lane, 3) for lane in range(3)] == [3, 2, 2]
    assert sum(places(1000, lane, 64) for lane in range(64)) == 1000


def test_processes_read_the_same_and_may_be_killed(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = files(tmp_path, "jsonl", monkeypatch)
    recipes = {(0, 0): recipe(text, tokenizer, 4), (1, 0): recipe(text, tokenizer, 4, 2 * T)}
    here, apart = Here(recipes), Processes(recipes, 2, ahead=3)
    try:
        pids = apart.pids
        for turn in range(12):
            for lane in (0, 3, 2):
                found = apart.read((0, 0, lane), turn, Position())
                assert same(found, here.read((0, 0, lane), turn, Position()))
                if turn == 4:
                    since = found.after
            if turn in (3, 7):
                os.kill(apart.pids[turn == 7], signal.SIGKILL)
            if turn == 2:  # it has answered, so it ignores this; one that is only starting would not yet
                os.kill(apart.pids[0], signal.SIGTERM)  # as to a whole job: it goes on
        assert all(a != b for a, b in zip(pids, apart.pids))
        assert capfd.readouterr().err.count("another one reads its") == 2
        # Back, forth, of another length, and from a position that was given.
        for key, number, at in (((0, 0, 2), 1, Position()), ((0, 0, 2), 20, since), ((1, 0, 1), 2, Position())):
            assert same(apart.read(key, number, at), here.read(key, number, at))
    finally:
        apart.close()
    with pytest.raises(RuntimeError, match=r"\(exit code 1\), 1 in a row.*data.workers=0"):
        monkeypatch.setattr("pretrain.data.streaming_readers.DEATHS", 1)
        broken = Processes({}, 1, ahead=1)
        try:
            broken.read((0, 0, 0), 0, Position())
        finally:
            monkeypatch.undo()
            broken.close()


BAD_ROWS = {
    "not JSON": b'{"text": "tru\n',
    "not text": b'{"text": 7}\n',
    "not an object": b'"text"\n',
    "not UTF-8": b'{"text": "\xff"}\n',
    "surrogate": b'{"text": "\\ud800"}\n',
    "another field": b'{"txt": "a"}\n',
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_bad_rows_are_named_or_counted(what: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [json.dumps({"text": each}).encode() + b"\n" for each in DOCUMENTS[:20]]
    at = sum(map(len, rows[:9]))
    (tmp_path / "a.jsonl").write_bytes(b"".join([*rows[:9], BAD_ROWS[what], *rows[9:]]))
    strict = Files(matched(tmp_path), "auto", Policy())
    with pytest.raises(DataError, match=rf"a\.jsonl byte {at}.*data\.on_bad=skip"):
        next(strict.blocks(0, 0)).read(9)
    with pytest.raises(DataError, match=f"byte {at}"):
        take(Lane(recipe(strict, tokenizer, 1), 0, Position()), 100)
    lenient = Files(matched(tmp_path), "auto", Policy(skip_bad=True))
    (block,) = lenient.blocks(0, 0)
    assert [text.text for text in block.texts] == DOCUMENTS[:20] and block.read(9) is None
    lane, bad = Lane(recipe(lenient, tokenizer, 1), 0, Position()), 0
    for epoch in (1, 2):  # each time that it is gone through
        while lane.position.epoch < epoch:
            bad += next(lane).bad
        assert bad in (epoch, epoch + 1)


def test_damaged_parquet_is_named_or_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = parquet(tmp_path / "a.parquet", DOCUMENTS[:64])
    raw = bytearray(path.read_bytes())
    third = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(1)
    raw[(third.dictionary_page_offset or third.data_page_offset) + third.total_compressed_size // 2] ^= 4
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.parquet row group 2 is not readable.*data\.on_bad=skip"):
        list(Files([path], "auto", Policy()).blocks(2, 0))
    lenient = Files([path], "auto", Policy(skip_bad=True))
    blocks = [block for unit in range(lenient.count) for block in lenient.blocks(unit, 0)]
    assert [text.text for block in blocks for text in block.texts] == DOCUMENTS[:32] + DOCUMENTS[48:64]
    assert sum(block.bad for block in blocks) == 1
    footer = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    for cut in (raw[:-3], raw[:200], raw[:footer] + raw[footer + 1 :], raw[:-8] + b"\0" + raw[-7:], b"PAR1"):
        path.write_bytes(cut)
        with pytest.raises(DataError, match=r"a\.parquet is not readable as parquet.*data\.on_bad=skip"):
            Files([path], "auto", Policy())
        left = Files([path], "auto", Policy(skip_bad=True))
        assert (left.count, left.bad) == (0, 1)


def test_a_row_group_that_ends_early_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.data.streaming_files import _parquet

    path = parquet(tmp_path / "a.parquet", DOCUMENTS[:32])

    class Short:
        """What pyarrow makes of some flipped bits."""

        def __init__(self, file: pyarrow.parquet.ParquetFile) -> None:
            self.metadata, self.schema_arrow, self.file = file.metadata, file.schema_arrow, file

        def __enter__(self) -> Short:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def iter_batches(self, *given: object, **named: object) -> list[pyarrow.RecordBatch]:
            return [batch.slice(0, batch.num_rows - 1) for batch in self.file.iter_batches(*given, **named)]

    monkeypatch.setattr("pretrain.data.streaming_files._parquet", lambda path: Short(_parquet(path)))
    with pytest.raises(DataError, match=r"a\.parquet row group 1 is not readable after its row 15: it states 16 rows"):
        list(Files([path], "auto", Policy()).blocks(1, 0))


def test_no_bit_of_parquet_flips_unseen(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", DOCUMENTS[:12], 4)
    raw = path.read_bytes()
    found = {"same": 0, "refused": 0}
    places = range(0, len(raw), 5)
    for at in places:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << at // 5 % 8]) + raw[at + 1 :])
        try:
            text = Files([path], "auto", Policy())
            texts = [t.text for unit in range(text.count) for block in text.blocks(unit, 0) for t in block.texts]
            assert texts == DOCUMENTS[:12], f"byte {at}"
            found["same"] += 1  # of the other column, of statistics, of padding
        except (DataError, UsageError) as error:
            assert "a.parquet" in str(error)
            found["refused"] += 1
    assert found["refused"] > len(places) // 4


def test_what_cannot_be_streamed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="matches no file"):
        matched(tmp_path / "*.jsonl")
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UsageError, match="cannot be streamed; unpack it"):
        Files(matched(tmp_path), "auto", Policy())
    parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(UsageError, match=r"no field 'txt'; its fields are: id, text.*stream.text_field"):
        Files([tmp_path / "a.parquet"], "auto", Policy("txt"))
    with pytest.raises(UsageError, match=r"data set .*split train.* cannot be opened: .*network"):
        Dataset(str(tmp_path / "nowhere"), None, "train", True, Policy())
    jsonl(tmp_path / "empty.jsonl", ["", "", ""])
    empty = Files([tmp_path / "empty.jsonl"], "auto", Policy())
    with pytest.raises(DataError, match="lane 0 of 1 found no text in 3 epochs"):
        next(Lane(recipe(empty, tokenizer, 1), 0, Position()))
