"""Documents out of rows: a byte range of JSON lines, a range of a Parquet file's row groups.

Ranges of one file hold each of its rows exactly once, so they can be read by different processes. What cannot be read is
named by file, row, byte or row group, or counted and passed over, as the reading policy says.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pretrain.data.errors import DataError, UsageError

if TYPE_CHECKING:
    from pretrain.data.sources import Reading

_BATCH_ROWS = 512
_WITHOUT_FIELD = 1000  # rows without the field before one concludes that none has it


def json_lines(path: Path, reading: Reading, start: int = 0, end: int | None = None) -> Iterator[str]:
    """The text of each row that begins in bytes [start, end) of the file (for a compressed one: of what it unpacks to).

    A row without the field, or with null in it, is an empty document. Raises DataError or ValueError as `reading` says.
    """
    row, offset, missing, found = 0, start, 0, False
    fields: set[str] = set()
    try:
        with _unpacked(path) as stream:
            if start:
                stream.seek(start - 1)
                offset = start - 1 + len(stream.readline())
            for line in stream:
                begins, offset = offset, offset + len(line)
                if end is not None and begins >= end:
                    break
                if not line.strip():
                    continue
                row += 1
                value = _parsed(line, path, row, begins, start, reading)
                if value is None:
                    continue
                if reading.text_field not in value:
                    missing += 1
                    fields.update(value)
                    if not found and missing >= _WITHOUT_FIELD:
                        break
                found = found or reading.text_field in value
                where = f"{path} row {row}" if not start else f"{path} byte {begins}"
                text = text_of(value.get(reading.text_field), where, reading)
                if text is not None:
                    reading.note_tag(value)
                    yield text
    except (EOFError, zlib.error, OSError) as error:
        reading.bad(
            f"{path} cannot be read after row {row} (byte {offset}): {_first_line(error)}",
            "copy the file again, check its permissions, or pass `--on-bad skip`",
        )
    if missing and not found:
        raise no_field(path, reading.text_field, fields)


def _unpacked(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb", buffering=1 << 20)


def _parsed(line: bytes, path: Path, row: int, begins: int, start: int, reading: Reading) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode("utf-8-sig" if begins == 0 else "utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"a JSON object is expected, this is {type(value).__name__}")
        text = value.get(reading.text_field)
        if isinstance(text, str) and not text.isascii():
            text.encode()  # a lone surrogate is valid JSON but not text
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        reason = f"is not UTF-8 ({error.reason})"
    except (ValueError, RecursionError) as error:
        reason = f"is not readable ({_first_line(error)})"
    else:
        return value
    number = row + rows_before(path, start) if not reading.skip_bad else row
    reading.bad(f"{path} row {number} (byte {begins}) {reason}", "mend the row, or pass `--on-bad skip`")
    return None


def rows_before(path: Path, offset: int) -> int:
    """Rows (lines that are not blank) that begin before byte `offset`."""
    count = at = 0
    if offset:
        with path.open("rb", buffering=1 << 20) as stream:
            for line in stream:
                if at >= offset:
                    break
                at += len(line)
                count += bool(line.strip())
    return count


def json_array(path: Path, reading: Reading) -> Iterator[str]:
    """The rows of a file that holds one JSON array of objects; it is read whole."""
    try:
        with _unpacked(path) as stream:
            values = json.loads(stream.read().decode("utf-8-sig"))
    except (EOFError, zlib.error, OSError, ValueError) as error:
        reading.bad(f"{path} is not readable as json: {_first_line(error)}", _MEND)
        return
    fields: set[str] = set()
    found = False
    for row, value in enumerate(values, 1):
        if not isinstance(value, dict):
            reading.bad(f"{path} row {row}: a JSON object is expected, this is {type(value).__name__}", _MEND)
            continue
        found = found or reading.text_field in value
        fields.update(value)
        text = text_of(value.get(reading.text_field), f"{path} row {row}", reading)
        if text is not None:
            reading.note_tag(value)
            yield text
    if fields and not found:
        raise no_field(path, reading.text_field, fields)


def is_json_array(path: Path) -> bool:
    """Whether a .json file holds an array rather than a row a line."""
    if ".json" not in (suffix.lower() for suffix in path.suffixes):
        return False
    try:
        with _unpacked(path) as stream:
            return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    except (EOFError, zlib.error, OSError):
        return False


_MEND = "copy the file again, correct `--format`, or pass `--on-bad skip`"


def parquet_rows(path: Path, reading: Reading, first: int = 0, last: int | None = None) -> Iterator[str]:
    """The text of each row in row groups [first, last). Of a row group that cannot be read, the rows from the first bad
    batch on count as unreadable. Page checksums are verified where the file has them.
    """
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        names, groups = file.schema_arrow.names, file.num_row_groups
    except Exception as error:  # pyarrow raises many kinds for damaged bytes
        reading.bad(f"{path} is not readable as parquet: {_first_line(error)}", _MEND)
        return
    with file:
        if reading.text_field not in names:
            raise no_field(path, reading.text_field, names)
        columns = columns_of(names, reading)
        for group in range(first, groups if last is None else min(last, groups)):
            given, rows = 0, file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
                    yield from batch_texts(batch, f"{path} row group {group}", given, reading)
                    given += batch.num_rows
                if given != rows:
                    raise ValueError(f"its footer says {rows} rows, {given} could be read")
            except (DataError, UsageError):
                raise
            except Exception as error:
                reading.bad(
                    f"{path} row group {group} of {groups} is not readable after {given} of its {rows} rows: "
                    f"{_first_line(error)}",
                    _MEND,
                    max(rows - given, 1),
                )


def columns_of(names: Iterable[str], reading: Reading) -> list[str]:
    """The columns to read, of those that there are."""
    return [name for name in (reading.text_field, reading.tag_field) if name is not None and name in names]


def batch_texts(batch: Any, where: str, before: int, reading: Reading) -> Iterator[str]:
    """The texts of an Arrow batch or table. where, before: what to call its rows, and how many came before."""
    import pyarrow

    column = batch.column(reading.text_field)
    tags = batch.column(reading.tag_field).to_pylist() if reading.tag_field in batch.schema.names else None
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pyarrow.large_binary()).to_pylist()
    for number, value in enumerate(values):
        named = f"{where} row {before + number + 1}"
        if isinstance(value, bytes) and not pyarrow.types.is_binary(column.type):
            try:
                value = value.decode()
            except UnicodeDecodeError as error:
                reading.bad(f"{named} is not UTF-8 at byte {error.start} of its text", _MEND)
                continue
        text = text_of(value, named, reading)
        if text is not None:
            reading.note_tag({} if tags is None else {reading.tag_field: tags[number]})
            yield text


def no_field(path: Path | str, name: str, fields: Any) -> UsageError:
    """The complaint that rows have no such field."""
    present = ", ".join(sorted(fields)) or "none"
    return UsageError(f"{path} has no field {name!r}; its fields are: {present}. Pass one as `--text-field`")


def text_of(value: Any, where: str, reading: Reading) -> str | None:
    """A row's text: "" for null, None for what is not text, which is counted or refused."""
    if value is None:
        return ""
    if not isinstance(value, str):
        reading.bad(
            f"{where}: field {reading.text_field!r} holds {type(value).__name__}, not text",
            "pass another `--text-field`, or `--on-bad skip`",
        )
        return None
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
