"""Documents out of files: plain text, JSON lines and Parquet."""

from __future__ import annotations

import fnmatch
import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.data.errors import DataError, UsageError

FORMATS = ("text", "jsonl", "parquet")
_BY_SUFFIX = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_NOT_TEXT = {
    *(".gz", ".zst", ".xz", ".bz2", ".lz4", ".zip", ".tar", ".tgz", ".rar", ".whl"),
    *(".csv", ".tsv", ".arrow", ".feather", ".orc", ".h5", ".sqlite", ".tfrecord", ".xlsx"),
    *(".bin", ".idx", ".npy", ".npz", ".pt", ".pth", ".safetensors", ".model", ".pkl", ".pickle"),
    *(".pyc", ".so", ".o", ".dll", ".exe", ".class", ".pdf", ".docx"),
    *(".png", ".jpg", ".jpeg", ".gif", ".mp3", ".mp4", ".avi"),
}


@dataclass
class Reading:
    """How to read, and what was left out while reading."""

    text_field: str = "text"
    skip_bad: bool = False
    document_bytes: int = 0
    cache: str | None = None
    undecodable: int = 0
    skipped: list[str] = field(default_factory=list)

    def bad(self, message: str, fix: str) -> None:
        """Counts something unreadable, or raises DataError with `message` and the fix if it may not be skipped."""
        if not self.skip_bad:
            raise DataError(f"{message}; {fix}")
        self.undecodable += 1
        self.skipped.append(message)


def expand(patterns: list[str], exclude: Sequence[str] = ()) -> list[Path]:
    """The files that the globs match (`**` crosses folders), sorted, each once.

    exclude: patterns for whole paths, in which `*` crosses folders too. Raises DataError for a glob without a file, or if
    none remains.
    """
    found: set[Path] = set()
    for pattern in patterns:
        # Path.glob refuses absolute patterns.
        paths = [Path(name) for name in glob.glob(str(Path(pattern).expanduser()), recursive=True)]  # noqa: PTH207
        files = [path for path in paths if path.is_file()]
        if not files:
            what = "matches only folders" if paths else "matches no file"
            hint = (
                f"for the files inside use '{pattern.rstrip('/')}/**/*'"
                if paths
                else "check the path, and quote the glob"
            )
            raise DataError(f"--input {pattern!r} {what}; {hint}")
        found.update(files)
    kept = [path for path in sorted(found) if not any(fnmatch.fnmatch(str(path), pattern) for pattern in exclude)]
    if not kept:
        raise DataError(f"--exclude leaves none of {len(found)} files; its `*` matches across folders: narrow it")
    return kept


def format_of(path: Path, chosen: str) -> str:
    """The format of one file: text, jsonl or parquet. Raises ValueError for a suffix that is known to be none of them."""
    if chosen != "auto":
        return chosen
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-2:-1] and suffixes[-1] in (".gz", ".zst") and suffixes[-2] in _BY_SUFFIX:
        return _BY_SUFFIX[suffixes[-2]]
    last = suffixes[-1] if suffixes else ""
    if last in _NOT_TEXT:
        raise UsageError(
            f"unknown format {last!r} of {path}: text, jsonl and parquet can be read; narrow the glob, or say "
            f"`--format text` if the file is plain text after all"
        )
    return _BY_SUFFIX.get(last, "text")


def documents(path: Path, form: str, reading: Reading) -> Iterator[str]:
    """The documents of one file, in order, empty ones included. Raises DataError or ValueError as `reading` says."""
    source = _text if form == "text" else _rows
    for document in source(path, form, reading):
        if reading.document_bytes and len(document) > reading.document_bytes // 4:
            yield from _pieces(document, reading.document_bytes)
        else:
            yield document


def _text(path: Path, form: str, reading: Reading) -> Iterator[str]:
    # Not by datasets' "text" reader: it opens files with universal newlines, so "\\r\\n" would not survive.
    try:
        raw = path.read_bytes()
        yield raw.decode()
    except UnicodeDecodeError as error:
        reading.bad(
            f"{path} is not UTF-8 at byte {error.start} (0x{raw[error.start]:02x})",
            f"convert it, leave it out with `--exclude '*/{path.name}'`, or pass `--on-bad skip`",
        )
    except OSError as error:
        reading.bad(f"{path} cannot be read: {error.strerror}", "check its permissions, or pass `--on-bad skip`")


def _rows(path: Path, form: str, reading: Reading) -> Iterator[str]:
    """Rows through datasets, streaming; a JSON file that it cannot parse is read on row by row, to name or skip the
    bad row.
    """
    if path.stat().st_size == 0:
        return
    given = 0
    try:
        for row in _stream(path, form, reading.cache):
            _require_field(row, path, reading.text_field)
            given += 1
            text = _text_of(row.get(reading.text_field), path, given, reading)
            if text is not None:
                yield text
    except (DataError, UsageError):
        raise
    except Exception as error:
        if form == "jsonl" and path.suffix.lower() in _BY_SUFFIX:
            yield from _json_rows(path, reading, given)
            return
        reading.bad(
            f"{path} is not readable as {form}: {_first_line(error)}",
            "copy the file again, correct `--format`, or pass `--on-bad skip`",
        )


def _stream(path: Path, form: str, cache: str | None) -> Any:
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    kind = "json" if form == "jsonl" else "parquet"
    return datasets.load_dataset(kind, data_files=[str(path)], split="train", streaming=True, cache_dir=cache)


def _json_rows(path: Path, reading: Reading, skip: int) -> Iterator[str]:
    offset, row = 0, 0
    with path.open("rb") as stream:
        for line in stream:
            start, offset = offset, offset + len(line)
            if not line.strip():
                continue
            row += 1
            if row <= skip:
                continue
            try:
                value = json.loads(line.decode())
                if not isinstance(value, dict):
                    raise ValueError(f"a JSON object is expected, this is {type(value).__name__}")
                text = value.get(reading.text_field)
                if isinstance(text, str):
                    text.encode()  # a lone surrogate is valid JSON but not text
            except (UnicodeDecodeError, UnicodeEncodeError) as error:
                _bad_row(reading, path, row, start, f"is not UTF-8 ({error.reason})")
            except ValueError as error:
                _bad_row(reading, path, row, start, f"is not readable ({_first_line(error)})")
            else:
                text = _text_of(text, path, row, reading)
                if text is not None:
                    yield text


def _bad_row(reading: Reading, path: Path, row: int, start: int, reason: str) -> None:
    reading.bad(f"{path} row {row} (byte {start}) {reason}", "mend the row, or pass `--on-bad skip`")


def _require_field(row: dict[str, Any], path: Path, name: str) -> None:
    if name not in row:
        present = ", ".join(sorted(row)) or "none"
        raise UsageError(f"{path} has no field {name!r}; its fields are: {present}. Pass one as `--text-field`")


def _text_of(value: Any, path: Path, row: int, reading: Reading) -> str | None:
    if value is None:
        return ""
    if not isinstance(value, str):
        reading.bad(
            f"{path} row {row}: field {reading.text_field!r} holds {type(value).__name__}, not text",
            "pass another `--text-field`, or `--on-bad skip`",
        )
        return None
    return value


def _pieces(document: str, limit: int) -> Iterator[str]:
    """Cuts at the last line break before `limit` bytes of UTF-8, within a line only if it is longer than that."""
    raw = document.encode()
    start = 0
    while len(raw) - start > limit:
        end = raw.rfind(b"\n", start, start + limit) + 1
        if end <= start:
            end = start + limit
            while end > start + 1 and raw[end] & 0xC0 == 0x80:  # not within a character
                end -= 1
        yield raw[start:end].decode()
        start = end
    yield raw[start:].decode()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
