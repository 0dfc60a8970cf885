"""Units of local files: stretches of JSON lines, row groups of Parquet, groups of text files."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.errors import DataError, UsageError
from pretrain.data.sources import format_of
from pretrain.data.streaming_units import Block, Policy

LEAST, MOST, PARTS = 1 << 14, 1 << 20, 1024
ROWS = 256  # of a Parquet row group in a block


def matched(path: Path) -> list[Path]:
    """The files that a path, a folder or a glob names (`**` crosses folders), sorted. Raises DataError for none."""
    pattern = f"{path}/**/*" if path.is_dir() else str(path)
    found = sorted({Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)})  # noqa: PTH111, PTH207
    files = [each for each in found if each.is_file()]
    if not files:
        raise DataError(
            f"{path} matches no file; a streamed source is text, jsonl or Parquet files by a glob, or a folder of them"
        )
    return files


class Files:
    """files: read in this order. form: "auto", "text", "jsonl" or "parquet".

    A unit has about a 1024th of the text, but at least 16 KiB and at most 1 MiB of it: whole text files; the lines of a jsonl
    file that begin in a range of bytes. Of Parquet it is a row group. Memory: 24 bytes a unit.
    Raises DataError for a file that cannot be opened, ValueError for one of another format.
    """

    def __init__(self, files: list[Path], form: str, policy: Policy) -> None:
        self.files, self.policy, self.bad = files, policy, 0
        self.forms = [_streamable(path, form) for path in files]
        self.sizes = [path.stat().st_size for path in files]
        self._unit_bytes = min(MOST, max(LEAST, sum(self.sizes) // PARTS))
        self._units = np.array(list(self._cut()), np.int64).reshape(-1, 3)

    @property
    def count(self) -> int:
        return len(self._units)

    @property
    def identity(self) -> object:
        # The folder may move. As with a bare Megatron pair the bytes themselves are not all read for it.
        above = os.path.commonpath([path.absolute().parent for path in self.files])
        names = [str(path.absolute().relative_to(above)) for path in self.files]
        return [list(each) for each in zip(names, self.forms, self.sizes)] + [self.bad]

    def _cut(self) -> Iterator[tuple[int, int, int]]:
        """(file, begin, end): bytes of a jsonl file; a row group and its first row; text files from `file` to `end`."""
        group, size = -1, 0  # text files that make up a unit so far
        for number, (path, form, length) in enumerate(zip(self.files, self.forms, self.sizes)):
            if group >= 0 and (form != "text" or size >= self._unit_bytes):
                yield group, 0, number
                group, size = -1, 0
            if form == "text":
                group, size = group if group >= 0 else number, size + length
            elif form == "jsonl":
                pieces = max(1, length // self._unit_bytes)
                for piece in range(pieces if length else 0):
                    yield number, length * piece // pieces, length * (piece + 1) // pieces
            elif length:
                row = 0
                for index, rows in enumerate(self._row_groups(path)):
                    yield number, index, row
                    row += rows
        if group >= 0:
            yield group, 0, len(self.files)

    def _row_groups(self, path: Path) -> list[int]:
        import pyarrow

        try:
            with _parquet(path) as file:
                names = file.schema_arrow.names
                found = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
                if sum(found) != file.metadata.num_rows:
                    raise OSError(
                        f"its row groups have {sum(found)} rows, not the {file.metadata.num_rows} that it states"
                    )
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            self.policy.bad(f"{path} is not readable as parquet: {_first_line(error)}", "copy the file again")
            self.bad += 1
            return []
        if self.policy.text_field not in names:
            raise UsageError(f"{self.policy.missing(names, str(path))}. Name one as stream.text_field")
        return found

    def blocks(self, unit: int, first: int) -> Iterator[Block]:
        number, begin, end = self._units[unit].tolist()
        form, path = self.forms[number], self.files[number]
        if form == "parquet":
            yield from self._rows(path, begin, end, first)
        elif first == 0 and form == "jsonl":
            yield Block(self._lines(path, begin, end), partial(self._line, path))
        elif first == 0:
            yield Block([(each, self.files[each]) for each in range(number, end)], self._whole)

    def where(self, unit: int, at: int) -> str:
        number, begin, _ = self._units[unit].tolist()
        form = self.forms[number]
        if form == "text":
            return str(self.files[at])
        return f"{self.files[number]} {'byte' if form == 'jsonl' else f'row group {begin} row'} {at}"

    def _whole(self, at: int, path: Path) -> str | None:
        raw = b""
        try:
            raw = path.read_bytes()
            return raw.decode()
        except UnicodeDecodeError as error:
            place = f"byte {error.start} (0x{raw[error.start]:02x})"
            return self.policy.bad(f"{path} is not UTF-8 at {place}", "convert it")
        except OSError as error:
            return self.policy.bad(f"{path} cannot be read: {error.strerror}", "check its permissions")

    def _lines(self, path: Path, begin: int, end: int) -> list[tuple[int, bytes]]:
        """(byte, line) of those that begin in a range of bytes, without empty ones."""
        try:
            with path.open("rb") as file:
                if begin:  # a line belongs to the unit in which it begins
                    file.seek(begin - 1)
                    file.readline()
                at = file.tell()
                raw = file.read(end - at) if at < end else b""
                raw += b"" if raw.endswith(b"\n") or not raw else file.readline()
        except OSError as error:
            raise DataError(f"{path} cannot be read at byte {begin}: {error.strerror}; copy the file again") from None
        lines = raw.split(b"\n")
        starts = accumulate((len(line) + 1 for line in lines), initial=at)
        return [(start, line) for start, line in zip(starts, lines) if line.strip()]

    def _line(self, path: Path, at: int, line: bytes) -> str | None:
        where = f"{path} byte {at}"
        try:
            value: Any = json.loads(line.decode())
        except UnicodeDecodeError as error:
            return self.policy.bad(f"{where} is not UTF-8 ({error.reason})", "mend the row")
        except ValueError as error:
            return self.policy.bad(f"{where} is not readable ({_first_line(error)})", "mend the row")
        if not isinstance(value, dict):
            what = f"{where}: a JSON object is expected, this is {type(value).__name__}"
            return self.policy.bad(what, "mend the row")
        if self.policy.text_field not in value:
            return self.policy.bad(self.policy.missing(list(value), where), "name one as stream.text_field")
        return self.policy.text(value[self.policy.text_field], where)

    def _rows(self, path: Path, group: int, row: int, first: int) -> Iterator[Block]:
        import pyarrow

        name, read = self.policy.text_field, 0
        try:
            with _parquet(path) as file:
                batches = file.iter_batches(ROWS, row_groups=[group], columns=[name], use_threads=False)
                for number, batch in enumerate(batches):
                    at, read = row + read, read + batch.num_rows
                    if number >= first:
                        values = batch.column(0).to_pylist()
                        yield Block(list(enumerate(values, at)), partial(self._row, path, group))
                stated = file.metadata.row_group(group).num_rows
                if read != stated:  # pyarrow takes some damage for the end
                    raise OSError(f"it states {stated} rows")
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            # What was read of it stays; what remains of the group counts once, for its rows cannot be told apart.
            what = f"{path} row group {group} is not readable after its row {read}: {_first_line(error)}"
            self.policy.bad(what, "copy the file again")
            yield Block(bad=1)

    def _row(self, path: Path, group: int, at: int, value: object) -> str | None:
        return self.policy.text(value, f"{path} row group {group} row {at}")


def _parquet(path: Path) -> Any:
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path, page_checksum_verification=True)  # where the writer made checksums


def _streamable(path: Path, form: str) -> str:
    found = format_of(path, form)
    if path.suffix.lower() in (".gz", ".zst", ".xz", ".bz2"):
        raise UsageError(
            f"{path}: a compressed file can only be read from its beginning, so it cannot be streamed; unpack it, or "
            "prepare it with `python -m pretrain.data prepare`"
        )
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
