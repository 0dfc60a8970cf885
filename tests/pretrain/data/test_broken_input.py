"""Damaged rows, files and row groups: named with their place, or counted and passed over; never silent."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from pretrain.data.errors import DataError, UsageError
from pretrain.data.rows import rows_before
from pretrain.data.sources import Reading, documents
from pretrain.data.units import documents_of, plan

TEXTS = [f"row {i} " + "abc " * (i % 9) for i in range(200)]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Ten row groups of 20 rows, with page checksums, another column before the text."""
    path = tmp_path / "rows.parquet"
    columns = pyarrow.table({"n": list(range(200)), "text": TEXTS})
    plain: dict[str, Any] = {"compression": "none", "use_dictionary": False}
    pyarrow.parquet.write_table(columns, path, row_group_size=20, write_page_checksum=True, **plain)
    return path


def read_parquet(path: Path, skip: bool = False) -> tuple[list[str], Reading]:
    reading = Reading(skip_bad=skip)
    return list(documents(path, "parquet", reading)), reading


def damage(path: Path, at: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


def place_in_group(path: Path, group: int) -> int:
    """A byte in the middle of the text's pages of a row group."""
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(group).column(1)
    return int(column.data_page_offset + column.total_compressed_size // 2)


def test_a_bad_row_group_is_named_or_its_rows_are_counted(table: Path) -> None:
    damage(table, place_in_group(table, 3))
    with pytest.raises(DataError, match=f"{table} row group 3 of 10 is not readable after 0 of its 20 rows: .*skip"):
        read_parquet(table)
    found, reading = read_parquet(table, skip=True)
    assert found == TEXTS[:60] + TEXTS[80:]
    assert reading.undecodable == 20
    assert len(reading.skipped) == 1
    assert "row group 3" in reading.skipped[0]


@pytest.mark.parametrize("unit_bytes", [1, 10**9])
def test_a_bad_row_group_costs_the_same_however_the_file_is_cut(table: Path, unit_bytes: int) -> None:
    damage(table, place_in_group(table, 0))
    damage(table, place_in_group(table, 9))
    reading = Reading(skip_bad=True)
    units = plan([(table, "parquet", table.stat().st_size)], (), unit_bytes)
    assert [text for unit in units for text in documents_of(unit, reading)] == TEXTS[20:180]
    assert reading.undecodable == 40


def test_a_truncated_file_is_one_unreadable_document(table: Path) -> None:
    raw = table.read_bytes()
    for size in (0, 3, 100, len(raw) // 2, len(raw) - 1):
        table.write_bytes(raw[:size])
        found, reading = read_parquet(table, skip=True)
        assert found == []
        assert reading.undecodable == (1 if size else 0)  # an empty file holds no rows
        if size:
            with pytest.raises(DataError, match=f"{table} is not readable as parquet"):
                read_parquet(table)


def test_bits_flipped_anywhere_are_noticed_or_harmless(table: Path) -> None:
    """Every row that is given out is right; what is not is counted. Statistics in the footer may change nothing."""
    raw = table.read_bytes()
    chance, noticed = random.Random(1), 0
    footer = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    for at in [*chance.sample(range(4, footer), 40), *chance.sample(range(footer, len(raw)), 40)]:
        table.write_bytes(raw)
        damage(table, at, chance.randrange(8))
        reading = Reading(skip_bad=True)
        try:
            found = list(documents(table, "parquet", reading))
        except UsageError as error:  # the column's name was hit
            assert "its fields are" in str(error)
            noticed += 1
            continue
        assert set(found) <= set(TEXTS)
        if found != TEXTS:
            assert reading.undecodable
            noticed += 1
    assert noticed > 25


def test_text_that_is_not_utf8_is_named_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    raw = [text.encode() for text in TEXTS[:30]]
    raw[17] = b"caf\xe9"
    column = pyarrow.array(raw, pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, row_group_size=10)
    with pytest.raises(DataError, match=f"{path} row group 1 row 8 is not UTF-8 at byte 3 of its text"):
        read_parquet(path)
    found, reading = read_parquet(path, skip=True)
    assert found == TEXTS[:17] + TEXTS[18:30]
    assert reading.undecodable == 1


@pytest.mark.parametrize("column", [[1, 2], [b"a", b"b"], [["a"], ["b"]]])
def test_columns_that_are_not_text(tmp_path: Path, column: list[Any]) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(DataError, match=f"row group 0 row 1: field 'text' holds {type(column[0]).__name__}, not text"):
        read_parquet(path)


def test_null_is_an_empty_document(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), path)
    assert read_parquet(path)[0] == ["a", "", "b"]


@pytest.mark.parametrize("unit_bytes", [40, 10**9])
def test_a_bad_line_is_named_by_row_and_byte(tmp_path: Path, unit_bytes: int) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": text}).encode() for text in TEXTS[:40]]
    lines[5] += b"\n"  # a blank line is no row
    lines[29] = lines[29][:-3]
    path.write_bytes(b"\n".join(lines))
    begins = len(b"\n".join(lines[:29])) + 1
    assert rows_before(path, begins) == 29
    units = plan([(path, "jsonl", path.stat().st_size)], (), unit_bytes)
    with pytest.raises(DataError, match=rf"{path} row 30 \(byte {begins}\) is not readable \(.*\); mend the row"):
        [text for unit in units for text in documents_of(unit, Reading())]
    reading = Reading(skip_bad=True)
    assert [text for unit in units for text in documents_of(unit, reading)] == TEXTS[:29] + TEXTS[30:40]
    assert reading.undecodable == 1


def test_flipped_bits_in_lines_are_noticed_or_change_one_document(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    raw = "\n".join(json.dumps({"text": text}) for text in TEXTS).encode()
    chance = random.Random(2)
    for at in chance.sample(range(len(raw)), 60):
        path.write_bytes(raw)
        damage(path, at, 7)  # no ASCII any more
        reading = Reading(skip_bad=True)
        found = list(documents(path, "jsonl", reading))
        assert reading.undecodable == 1
        assert len(found) in (198, 199)  # a line break that is gone joins two rows
        with pytest.raises(DataError, match=r"row \d+ \(byte \d+\) is not"):
            list(documents(path, "jsonl", Reading()))


def test_a_cut_archive_gives_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    chance = random.Random(3)
    texts = [f"{chance.getrandbits(400):x}" for _ in range(500)]
    packed = gzip.compress("\n".join(json.dumps({"text": text}) for text in texts).encode())
    path.write_bytes(packed)
    assert list(documents(path, "jsonl", Reading())) == texts
    path.write_bytes(packed[: len(packed) // 2])
    reading = Reading(skip_bad=True)
    found = list(documents(path, "jsonl", reading))
    assert found == texts[: len(found)]
    assert 100 < len(found) < 400
    assert reading.undecodable == 1
    with pytest.raises(
        DataError, match=rf"{path} cannot be read after row {len(found)} \(byte \d+\): Compressed file ended"
    ):
        list(documents(path, "jsonl", Reading()))
    flipped = bytearray(packed)
    flipped[-6] ^= 1  # in the checksum of the whole
    path.write_bytes(flipped)
    with pytest.raises(DataError, match=r"cannot be read after row 499 .*CRC check failed"):
        list(documents(path, "jsonl", Reading()))


def test_zstandard(tmp_path: Path) -> None:
    raw = "\n".join(json.dumps({"text": text}) for text in TEXTS).encode()
    path = tmp_path / "rows.jsonl.zst"
    with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(raw)
    assert list(documents(path, "jsonl", Reading())) == TEXTS
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read after row"):
        list(documents(path, "jsonl", Reading()))


def test_a_json_array_is_read_as_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    assert list(documents(path, "jsonl", Reading())) == TEXTS
    (unit,) = plan([(path, "jsonl", path.stat().st_size)], (), 100)
    assert list(documents_of(unit, Reading())) == TEXTS
    path.write_text('[{"text": "a"}, 5]')
    with pytest.raises(DataError, match=r"row 2: a JSON object is expected, this is int"):
        list(documents(path, "jsonl", Reading()))
    path.write_text('[{"body": "a"}]')
    with pytest.raises(UsageError, match="has no field 'text'; its fields are: body"):
        list(documents(path, "jsonl", Reading()))
    path.write_text("[")
    with pytest.raises(DataError, match="is not readable as json"):
        list(documents(path, "jsonl", Reading()))


def test_rows_without_the_field(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"text": "x"}\n{"b": 2}\n')
    assert list(documents(path, "jsonl", Reading())) == ["", "x", ""]
    path.write_text('{"a": 1}\n{"b": 2}\n')
    with pytest.raises(UsageError, match="has no field 'text'; its fields are: a, b"):
        list(documents(path, "jsonl", Reading()))
    path.write_text('{"a": 1}\n' * 5000 + "{")
    with pytest.raises(UsageError, match="has no field 'text'; its fields are: a"):  # before all of it has been read
        list(documents(path, "jsonl", Reading()))
