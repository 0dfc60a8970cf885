"""Megatron's `.idx` files, read and judged before anything trusts them: megatron-core's own reader takes what it finds.

Layout (little endian): 9 bytes magic, u64 version, u8 dtype code, u64 S sequences, u64 D document borders, then int32
[S] lengths, int64 [S] byte offsets into the `.bin`, int64 [D] sequence numbers at which documents begin and end, and in
multimodal data int8 [S] modes, which nothing but the size of the file announces.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
DTYPES: dict[int, type[np.integer]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
REPAIR = "copy the file again from its source, or rebuild it with `python -m pretrain.data prepare ... --overwrite`"
_FLOATS = {6: "float64", 7: "float32"}
_BLOCK = 1 << 17  # numbers of each column that are looked at together: a MiB, which stays in the cache


@dataclass(frozen=True)
class IndexHeader:
    """The fixed part of an `.idx` file. `borders` is D: documents + 1. `modes`: whether sequences have modes."""

    dtype: np.dtype
    sequences: int
    borders: int
    modes: bool = False


def pack_header(dtype: np.dtype, sequences: int, borders: int) -> bytes:
    """The first HEADER_BYTES of an `.idx` file."""
    code = next(code for code, known in DTYPES.items() if known is dtype.type)
    return MAGIC + struct.pack("<QBQQ", 1, code, sequences, borders)


def check_size(path: Path, expected: int, what: str) -> None:
    """Raises DataError with the file, expected and actual bytes unless `path` has exactly `expected` bytes."""
    if not path.is_file():
        raise DataError(f"{path} is missing; {REPAIR}")
    actual = path.stat().st_size
    if actual != expected:
        state = "truncated" if actual < expected else "too long"
        raise DataError(f"{path} is {state}: expected {expected} bytes ({what}), found {actual}; {REPAIR}")


def read_header(path: Path) -> IndexHeader:
    """Reads and judges the header and the size of an `.idx` file. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path} is missing; {REPAIR}")
    try:
        with path.open("rb") as stream:
            head = stream.read(HEADER_BYTES)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}; {REPAIR}") from None
    if len(head) < HEADER_BYTES:
        raise DataError(f"{path} is truncated: its header needs {HEADER_BYTES} bytes, found {len(head)}; {REPAIR}")
    if head[:9] != MAGIC:
        raise DataError(
            f"{path} is not a Megatron index: its first 9 bytes are {head[:9]!r}, expected {MAGIC!r}; {REPAIR}"
        )
    version, code, sequences, borders = struct.unpack("<QBQQ", head[9:])
    if version != 1:
        raise DataError(f"{path} has index version {version} at byte 9, only version 1 is known; {REPAIR}")
    if code in _FLOATS:
        raise DataError(f"{path} has dtype code {code} at byte 17: {_FLOATS[code]}, which are not token ids; {REPAIR}")
    if code not in DTYPES:
        raise DataError(
            f"{path} has dtype code {code} at byte 17, expected one of {sorted(DTYPES)} (integers); {REPAIR}"
        )
    size = HEADER_BYTES + 12 * sequences + 8 * borders
    modes = sequences > 0 and path.stat().st_size == size + sequences
    if not modes:
        check_size(path, size, f"header, {sequences} sequences, {borders} borders")
    if sequences == 0 or borders < 2:
        raise DataError(f"{path} holds no documents; prepare it again from an input that has text")
    return IndexHeader(np.dtype(DTYPES[code]), sequences, borders, modes)


class _Column:
    """One of the arrays of an index, read from its beginning on. Not mapped: pages of a file of gigabytes would count as
    this process's memory, and numbers that begin at odd bytes are slow.
    """

    def __init__(self, path: Path, dtype: str, offset: int) -> None:
        self._path, self._dtype, self._at = path, np.dtype(dtype), offset
        self._file = path.open("rb", buffering=0)
        self._file.seek(offset)

    def read(self, count: int) -> np.ndarray:
        """The next `count` numbers. Raises DataError if the file ends or fails before."""
        values = np.empty(count, self._dtype)
        left = values.data.cast("B")
        while left:
            try:
                taken = self._file.readinto(left)
            except OSError as error:
                raise DataError(f"{self._path} cannot be read at byte {self._at}: {error}; {REPAIR}") from None
            if not taken:
                raise DataError(f"{self._path} ended at byte {self._at} while it was read; {REPAIR}")
            self._at, left = self._at + taken, left[taken:]
        return values

    def close(self) -> None:
        self._file.close()


def read_index(prefix: Path) -> tuple[IndexHeader, np.ndarray]:
    """Checks `prefix.idx` against itself and against the size of `prefix.bin`.

    Returns the header, and the tokens before each document, int64 [documents + 1]. A document may be several Megatron
    sequences (one a sentence); they lie back to back. Memory: 8 bytes a document, and while it is read 8 a sequence if
    these are not the same. Raises DataError naming the file and the offset of the first thing that is wrong.
    """
    path, data = prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")
    header = read_header(path)
    before = _read_sequences(path, data, header)
    if before[-1] == 0:
        raise DataError(f"{path} holds no tokens; prepare it again from an input that has text")
    size = int(before[-1]) * header.dtype.itemsize
    check_size(data, size, f"{int(before[-1])} tokens of {header.dtype}")
    return header, _read_borders(path, header, before)


def read_modes(prefix: Path) -> np.ndarray | None:
    """The mode of each sequence, int8 [sequences]; None if the index has none. Raises DataError."""
    path = prefix.with_name(prefix.name + ".idx")
    header = read_header(path)
    if not header.modes:
        return None
    column = _Column(path, "i1", HEADER_BYTES + 12 * header.sequences + 8 * header.borders)
    try:
        return column.read(header.sequences)
    finally:
        column.close()


def _read_sequences(path: Path, data: Path, header: IndexHeader) -> np.ndarray:
    """Tokens before each sequence, int64 [sequences + 1]."""
    count, item = header.sequences, header.dtype.itemsize
    at_pointers = HEADER_BYTES + 4 * count
    before = np.zeros(count + 1, np.int64)
    columns = _Column(path, "<i4", HEADER_BYTES), _Column(path, "<i8", at_pointers)
    try:
        for first in range(0, count, _BLOCK):
            size = min(_BLOCK, count - first)
            lengths, pointers = (column.read(size) for column in columns)
            if lengths.min() < 0:
                i = int(np.argmax(lengths < 0))
                where = HEADER_BYTES + 4 * (first + i)
                raise DataError(f"{path}: sequence {first + i} has length {lengths[i]} at byte {where}; {REPAIR}")
            ends = before[first + 1 : first + size + 1]
            np.cumsum(lengths, dtype=np.int64, out=ends)
            ends += before[first]
            wrong = pointers != before[first : first + size] * item
            if wrong.any():
                i = first + int(np.argmax(wrong))
                begin, expected = int(pointers[i - first]), int(before[i]) * item
                end = begin + int(lengths[i - first]) * item
                held = data.stat().st_size if data.is_file() else 0
                if begin < 0 or end > held:
                    why = f"and ends at {end}: outside the {held} bytes of {data.name}"
                elif begin < expected:
                    why = f"where it overlaps its predecessors, which end at {expected}"
                else:
                    why = f"but its predecessors end at {expected}, and what lies between belongs to no sequence"
                raise DataError(
                    f"{path}: sequence {i} points to byte {begin} of the .bin, {why} "
                    f"(index byte {at_pointers + 8 * i}); {REPAIR}"
                )
    finally:
        for column in columns:
            column.close()
    return before


def _read_borders(path: Path, header: IndexHeader, before: np.ndarray) -> np.ndarray:
    """Tokens before each document, int64 [documents + 1], from those before each sequence."""
    offset = HEADER_BYTES + 12 * header.sequences
    column = _Column(path, "<i8", offset)
    # Most corpora have one sequence a document: then the one array is the other, and is not copied.
    found = None if header.borders == len(before) else np.empty(header.borders, np.int64)
    last = 0
    try:
        for first in range(0, header.borders, _BLOCK):
            borders = column.read(min(_BLOCK, header.borders - first))
            whole = first + len(borders) == header.borders
            falls = np.diff(borders, prepend=last if first else 0) < 0
            bad = falls | (borders > header.sequences)
            bad[0] |= first == 0 and borders[0] != 0
            bad[-1] |= whole and borders[-1] != header.sequences
            if bad.any():
                i = int(np.argmax(bad))
                raise DataError(
                    f"{path}: document borders (from byte {offset}) must rise from 0 to {header.sequences}, but "
                    f"border {first + i} at byte {offset + 8 * (first + i)} is {borders[i]}; {REPAIR}"
                )
            if found is None and (borders != np.arange(first, first + len(borders))).any():
                found = np.empty(header.borders, np.int64)
                found[:first] = before[:first]
            if found is not None:
                found[first : first + len(borders)] = before[borders]
            last = int(borders[-1])
    finally:
        column.close()
    return before if found is None else found
