"""Documents out of files: plain text, JSON lines and Parquet."""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.data.errors import DataError, UsageError
from pretrain.data.rows import is_json_array, json_array, json_lines, parquet_rows

KEPT_MESSAGES = 20
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
    """How to read, and what was left out while reading. tag: of the document that was read last, what its row holds in
    `tag_field`."""

    text_field: str = "text"
    skip_bad: bool = False
    document_bytes: int = 0
    tag_field: str | None = None
    tag: str | None = None
    undecodable: int = 0
    skipped: list[str] = field(default_factory=list)

    def note_tag(self, row: dict[Any, Any]) -> None:
        """Keeps the tag of a row that is about to be given out."""
        found = None if self.tag_field is None else row.get(self.tag_field)
        self.tag = found if isinstance(found, str) else None

    def bad(self, message: str, fix: str, documents: int = 1) -> None:
        """Counts something unreadable, or raises DataError with `message` and the fix if it may not be skipped.

        documents: how many are lost by it, 1 if nobody knows. The first few messages are kept in `skipped`.
        """
        if not self.skip_bad:
            raise DataError(f"{message}; {fix}")
        self.undecodable += documents
        if len(self.skipped) < KEPT_MESSAGES:
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


def documents(path: Path, form: str, reading: Reading, first: int = 0, last: int | None = None) -> Iterator[str]:
    """The documents of one file, in order, empty ones included. first, last: only those that begin in this range of bytes
    (jsonl, uncompressed) or row groups (parquet). Raises DataError or ValueError as `reading` says.
    """
    found: Iterator[str]
    if form == "text":
        found = _text(path, reading)
    elif path.stat().st_size == 0:
        found = iter(())
    elif form == "parquet":
        found = parquet_rows(path, reading, first, last)
    elif is_json_array(path):
        found = json_array(path, reading)
    else:
        found = json_lines(path, reading, first, last)
    return in_pieces(found, reading)


def in_pieces(found: Iterator[str], reading: Reading) -> Iterator[str]:
    """The documents, long ones in pieces if `reading` says so."""
    if not reading.document_bytes:
        return found
    return (piece for document in found for piece in _cut(document, reading.document_bytes))


def _cut(document: str, limit: int) -> Iterable[str]:
    return _pieces(document, limit) if len(document) > limit // 4 else (document,)


def _text(path: Path, reading: Reading) -> Iterator[str]:
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
