"""Units of work: the input cut into pieces that are prepared, committed and, after a kill, found again one by one.

The cut depends on the input alone, not on processes or machines, so that all of them mean the same unit by its number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import xxhash

from pretrain.data.hub import HubDataset, dataset_rows, shard_rows
from pretrain.data.rows import is_json_array
from pretrain.data.sources import Reading, documents, in_pieces

_LARGEST, _SMALLEST, _UNITS = 32_000_000, 1_000_000, 64

File = tuple[Path, str, int]
"""A file, its format and its size in bytes."""


@dataclass(frozen=True)
class Slice:
    """Part of one input. first, last: bytes (jsonl), row groups (parquet), rows or the number of a shard (a dataset); last is
    None if it goes to the end. size: bytes of input, for progress; an estimate for datasets."""

    name: str
    form: str
    first: int
    last: int | None
    size: int


@dataclass(frozen=True)
class Unit:
    """One piece of work. dataset: what its slices are of, None for files."""

    number: int
    slices: tuple[Slice, ...]
    dataset: HubDataset | None = None

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(part.size for part in self.slices)

    @property
    def name(self) -> str:
        """For people."""
        more = f" and {len(self.slices) - 1} more" if len(self.slices) > 1 else ""
        part = self.slices[0]
        return f"{self.dataset or part.name} [{part.first}:{'' if part.last is None else part.last}]{more}"

    @cached_property
    def key(self) -> str:
        """Names the unit: 16 hexadecimal digits of its slices' names, ranges and sizes."""
        digest = xxhash.xxh3_64()
        for part in self.slices:
            digest.update(repr((part.name, part.form, part.first, part.last, part.size, self.dataset)).encode())
        return digest.hexdigest()

    def stamp(self) -> str:
        """Changes when one of the files is written again, even with as many bytes as before."""
        digest = xxhash.xxh3_64()
        for part in self.slices:
            path = Path(part.name)
            digest.update(str(path.stat().st_mtime_ns if self.dataset is None and path.exists() else 0).encode())
        return digest.hexdigest()


def unit_bytes_for(total: int) -> int:
    """Bytes of a unit for so much input: enough units for many processes, none larger than a kill may cost."""
    return min(_LARGEST, max(_SMALLEST, total // _UNITS))


def plan(files: Sequence[File], datasets: Sequence[HubDataset] = (), unit_bytes: int | None = None) -> list[Unit]:
    """The units of the input, in its order. unit_bytes: of a unit, about; by the size of the input if None."""
    of_files = unit_bytes or unit_bytes_for(sum(size for _, _, size in files))
    units: list[Unit] = []
    held: list[Slice] = []
    size = 0
    for file in files:
        for part in _slices(file, of_files):
            if held and size + part.size > of_files:
                units.append(Unit(len(units), tuple(held)))
                held, size = [], 0
            held.append(part)
            size += part.size
    if held:
        units.append(Unit(len(units), tuple(held)))
    for dataset in datasets:
        for part in _dataset_slices(dataset, unit_bytes):
            units.append(Unit(len(units), (part,), dataset))
    return units


def _slices(file: File, unit_bytes: int) -> Iterator[Slice]:
    path, form, size = file
    if form == "jsonl" and size > unit_bytes and path.suffix.lower() not in (".gz", ".zst") and not is_json_array(path):
        count = -(-size // unit_bytes)
        borders = [size * part // count for part in range(count + 1)]
        for first, last in pairwise(borders):
            yield Slice(str(path), form, first, last, last - first)
    elif form == "parquet" and size > unit_bytes:
        yield from _row_groups(path, size, unit_bytes)
    else:
        yield Slice(str(path), form, 0, None, size)


def _row_groups(path: Path, size: int, unit_bytes: int) -> Iterator[Slice]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    except Exception:  # who reads it will say what is wrong
        sizes = []
    if not sizes:
        yield Slice(str(path), "parquet", 0, None, size)
        return
    scale = size / max(sum(sizes), 1)  # sizes in memory to bytes of the file, which progress counts
    first, held = 0, 0
    for group, each in enumerate(sizes):
        if held and (held + each) * scale > unit_bytes:
            yield Slice(str(path), "parquet", first, group, int(held * scale))
            first, held = group, 0
        held += each
    yield Slice(str(path), "parquet", first, len(sizes), int(held * scale))


def _dataset_slices(dataset: HubDataset, unit_bytes: int | None) -> Iterator[Slice]:
    identity = f"{dataset.name} {dataset.identity()}"
    if dataset.streaming:
        for shard in range(dataset.shards()):
            yield Slice(identity, "shard", shard, None, 0)
        return
    found = dataset.open()
    rows = found.num_rows
    total = int(found.data.nbytes)  # of all columns, and of rows that a selection leaves out: enough to cut by
    each = max(1, rows * (unit_bytes or unit_bytes_for(total)) // max(total, 1))
    for first in range(0, rows, each):
        last = min(first + each, rows)
        yield Slice(identity, "rows", first, last, total * (last - first) // max(rows, 1))


def documents_of(unit: Unit, reading: Reading) -> Iterator[str]:
    """The documents of a unit, in order, empty ones included. Raises DataError or ValueError as `reading` says."""
    for part in unit.slices:
        if unit.dataset is None:
            yield from documents(Path(part.name), part.form, reading, part.first, part.last)
        elif part.form == "shard":
            yield from in_pieces(shard_rows(unit.dataset, part.first, reading), reading)
        else:
            assert part.last is not None
            yield from in_pieces(dataset_rows(unit.dataset, part.first, part.last, reading), reading)
