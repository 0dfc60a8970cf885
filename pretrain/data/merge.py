"""Finished units to a corpus: duplicates removed, documents shuffled, `.bin`/`.idx` written, in memory that stays small.

Every run of a unit is sorted by the documents' keys, so all documents of a range of keys lie together in each: range by
range they are gathered, sorted and written, which is a merge with sequential reads. Equal documents have equal keys and
meet in the same range. What grows with the corpus is one byte a document (is it kept?), and four for each run and range.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from pretrain.data import interruption
from pretrain.data.errors import DataError
from pretrain.data.parts import LOSSY, TABLE, VALIDATION, RunRecord, UnitRecord, run_file
from pretrain.data.writer import PairWriter

RANGE_BYTES, RANGE_DOCUMENTS, MOST_RANGES = 32_000_000, 1 << 17, 4096
SPLITS = ("train", "validation")
_SLICES = 1 << 16  # documents put together at a time


@dataclass
class Run:
    """A sorted run of documents on disk, read from its beginning to its end range by range."""

    folder: Path
    number: int
    record: RunRecord
    hashes: dict[str, Any] = field(default_factory=lambda: {"tokens": xxhash.xxh3_64(), "text": xxhash.xxh3_64()})
    at: dict[str, int] = field(default_factory=lambda: {"tokens": 0, "text": 0})

    def rows(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows of the table, TABLE [last - first]."""
        last = self.record.documents if last is None else last
        return np.fromfile(
            run_file(self.folder, self.number, "table"), TABLE, last - first, offset=first * TABLE.itemsize
        )

    def checked_rows(self) -> np.ndarray:
        """All rows. Raises DataError if they are not what was written."""
        rows = self.rows()
        if xxhash.xxh3_64_hexdigest(rows.tobytes()) != self.record.hashes["table"]:
            self._damaged("table")
        return rows

    def next(self, kind: str, size: int) -> bytes:
        """The next `size` bytes of the tokens or the text. Raises DataError if the file, at its end, is not what was
        written.
        """
        raw = b""
        if size:
            with run_file(self.folder, self.number, kind).open("rb") as stream:
                stream.seek(self.at[kind])
                raw = stream.read(size)
        self.at[kind] += size
        self.hashes[kind].update(raw)
        ended = self.at[kind] == self.record.bytes[kind]
        if len(raw) != size or (ended and self.hashes[kind].hexdigest() != self.record.hashes[kind]):
            self._damaged(kind)
        return raw

    def signatures(self) -> np.ndarray:
        """uint32 [documents, slots], mapped. Raises DataError if they are not what was written."""
        path, digest = run_file(self.folder, self.number, "signatures"), xxhash.xxh3_64()
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != self.record.hashes["signatures"]:
            self._damaged("signatures")
        return np.memmap(path, np.uint32, "r").reshape(self.record.documents, -1)

    def _damaged(self, kind: str) -> None:
        path = run_file(self.folder, self.number, kind)
        raise DataError(
            f"{path} is damaged: its hash differs from what was written; remove the folder {path.parent} and run the "
            "same `prepare` again, which makes this unit anew"
        )


class Batch(NamedTuple):
    """Documents to write. rows: TABLE [documents]; tokens, text: end to end, as their rows lie. order: the rows to write."""

    rows: np.ndarray
    tokens: bytes
    text: bytes
    order: np.ndarray


class Chosen:
    """Which documents of all runs go into the corpus. kept: bool [documents] for each run.
    itemsize: bytes of a token id."""

    def __init__(self, units: Sequence[tuple[UnitRecord, Path]], itemsize: int) -> None:
        self.units = list(units)
        self.itemsize = itemsize
        self.runs: list[Run] = []
        self.unit_of: list[int] = []
        for number, (record, folder) in enumerate(self.units):
            self.runs += [Run(folder, place, run) for place, run in enumerate(record.runs)]
            self.unit_of += [number] * len(record.runs)
        self.kept = [np.ones(run.record.documents, bool) for run in self.runs]
        self._cut_into_ranges()
        self._drop_duplicates()
        self.duplicates = [int((~kept).sum()) for kept in self.kept]
        self.near_duplicates: int | None = None

    def _cut_into_ranges(self) -> None:
        total = sum(run.record.bytes["tokens"] for run in self.runs)
        documents = sum(run.record.documents for run in self.runs)
        self.ranges = min(max(-(-total // RANGE_BYTES), -(-documents // RANGE_DOCUMENTS), 1), MOST_RANGES)
        width = (1 << 64) // self.ranges
        borders = np.array([width * number for number in range(1, self.ranges)], np.uint64)
        self.cuts = np.zeros((len(self.runs), self.ranges + 1), np.uint32)
        for run, cuts in zip(self.runs, self.cuts):
            cuts[1:-1] = np.searchsorted(run.checked_rows()["key"], borders)
            cuts[-1] = run.record.documents

    def gathered(self, number: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, int]]]:
        """(rows of a range of keys, whether each is kept, (run, first, last) for each run that has some), run by run."""
        parts = [(r, int(a), int(b)) for r, (a, b) in enumerate(self.cuts[:, number : number + 2]) if a != b]
        if not parts:
            return np.zeros(0, TABLE), np.zeros(0, bool), []
        rows = np.concatenate([self.runs[r].rows(a, b) for r, a, b in parts])
        return rows, np.concatenate([self.kept[r][a:b] for r, a, b in parts]), parts

    def _drop_duplicates(self) -> None:
        for number in range(self.ranges):
            rows, _, parts = self.gathered(number)
            # Stable: of equal documents the first of the input comes first, and stays.
            order = np.lexsort((rows["low"], rows["high"]))
            same = np.ones(max(len(rows) - 1, 0), bool)
            for name in ("high", "low"):
                same &= rows[name][order[1:]] == rows[name][order[:-1]]
            repeated = np.zeros(len(rows), bool)
            repeated[order[1:][same]] = True
            at = 0
            for r, a, b in parts:
                self.kept[r][a:b] = ~repeated[at : at + b - a]
                at += b - a
            interruption.check()

    def limit(self, limit_bytes: int) -> bool:
        """Keeps documents in the input's order until they have this much text; what follows is forgotten. Returns whether
        there was so much.
        """
        left, used = limit_bytes, 0
        while left > 0 and used < len(self.runs):
            rows, kept = self.runs[used].rows(), self.kept[used]
            order = np.argsort(rows["place"], kind="stable")
            sizes = np.where(kept, rows["bytes"], 0)[order].astype(np.int64)
            kept[order[np.cumsum(sizes) - sizes >= left]] = False
            left -= int(sizes.sum())
            used += 1
        if left > 0:
            return False
        self.units = self.units[: self.unit_of[used - 1] + 1]
        for each in (self.runs, self.unit_of, self.kept, self.duplicates):
            del each[used:]
        self.cuts = self.cuts[:used]
        return True

    def drop_near_duplicates(self, threshold: float, scratch: Path) -> None:
        """Of documents that resemble each other only the first stays; see pretrain/data/near.py."""
        from pretrain.data.near import near_duplicates

        before = sum(int(kept.sum()) for kept in self.kept)
        found = near_duplicates([run.signatures() for run in self.runs], threshold, scratch)
        at = 0
        for kept in self.kept:
            kept &= ~found[at : at + len(kept)]
            at += len(kept)
        self.near_duplicates = before - sum(int(kept.sum()) for kept in self.kept)

    def dropped(self) -> dict[str, int]:
        """How many documents were left out, by reason."""
        counts: Counter[str] = Counter(duplicate=0, empty=0, unreadable=0)
        for record, _ in self.units:
            counts.update(record.dropped)
        counts["duplicate"] += sum(self.duplicates)
        if self.near_duplicates is not None:
            counts["near_duplicate"] = self.near_duplicates
        return dict(counts)

    def shuffled(self) -> Iterator[Batch]:
        """All documents that are kept, in the order of their keys."""
        for number in range(self.ranges):
            rows, kept, parts = self.gathered(number)
            pieces: dict[str, list[bytes]] = {"tokens": [], "text": []}
            at = 0
            for r, a, b in parts:
                self._read(self.runs[r], rows[at : at + b - a], pieces)
                at += b - a
            order = np.lexsort((rows["low"], rows["high"], rows["key"]))
            yield Batch(rows, b"".join(pieces["tokens"]), b"".join(pieces["text"]), order[kept[order]])

    def in_order(self) -> Iterator[Batch]:
        """All documents that are kept, in the order of the input."""
        for run, kept in zip(self.runs, self.kept):
            rows = run.rows()
            pieces: dict[str, list[bytes]] = {"tokens": [], "text": []}
            self._read(run, rows, pieces)
            order = np.argsort(rows["place"], kind="stable")
            yield Batch(rows, pieces["tokens"][0], pieces["text"][0], order[kept[order]])

    def _read(self, run: Run, rows: np.ndarray, pieces: dict[str, list[bytes]]) -> None:
        held = (rows["flags"] & VALIDATION) != 0
        pieces["tokens"].append(run.next("tokens", int(rows["tokens"].sum(dtype=np.int64)) * self.itemsize))
        pieces["text"].append(run.next("text", int(rows["bytes"][held].sum(dtype=np.int64))))


class Pairs:
    """The two splits as they are written, and what they hold."""

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in SPLITS}
        self.lossless = True
        self._writers = {name: PairWriter(folder / name, dtype) for name in SPLITS}
        self._text = (folder / "validation_text.bin").open("wb")

    def add(self, batch: Batch) -> None:
        """Writes documents in the order that the batch asks for."""
        rows = batch.rows
        ids = np.frombuffer(batch.tokens, self.dtype)
        ends = np.cumsum(rows["tokens"], dtype=np.int64)
        held = (rows["flags"] & VALIDATION) != 0
        text_ends = np.cumsum(np.where(held, rows["bytes"], 0).astype(np.int64))
        self.lossless &= not (rows["flags"][batch.order] & LOSSY).any()
        for name, wanted in zip(SPLITS, (~held, held)):
            chosen = batch.order[wanted[batch.order]]
            self._count(self.counts[name], rows[chosen])
            for first in range(0, len(chosen), _SLICES):
                some = chosen[first : first + _SLICES]
                lengths = rows["tokens"][some].astype(np.int64)
                pieces = [ids[a:b] for a, b in zip((ends[some] - lengths).tolist(), ends[some].tolist())]
                self._writers[name].add(np.concatenate(pieces), lengths)
        for row in batch.order[held[batch.order]].tolist():
            end = int(text_ends[row])
            self._text.write(batch.text[end - int(rows["bytes"][row]) : end])

    def _count(self, counts: Counter[str], rows: np.ndarray) -> None:
        if len(rows):
            sums = {name: int(rows[name].sum(dtype=np.int64)) for name in ("tokens", "bytes")}
            counts.update(documents=len(rows), **sums)
            counts["longest"] = max(counts["longest"], int(rows["tokens"].max()))

    def finish(self) -> None:
        """Completes the files."""
        self._text.close()
        for writer in self._writers.values():
            writer.finish()

    def close(self) -> None:
        """Lets go of the files, after a failure too."""
        with contextlib.suppress(OSError):
            self._text.close()
        for writer in self._writers.values():
            writer.abandon()


def write(chosen: Chosen, shuffle: bool, folder: Path, dtype: np.dtype, report: Callable[[int], None]) -> Pairs:
    """Writes `train` and `validation` pairs and `validation_text.bin` to `folder`. report: called with the bytes of tokens
    that were read of the units.
    """
    pairs = Pairs(folder, dtype)
    with contextlib.closing(pairs):
        done = 0
        for batch in chosen.shuffled() if shuffle else chosen.in_order():
            pairs.add(batch)
            done += len(batch.tokens)
            report(done)
            interruption.check()
        pairs.finish()
    return pairs
