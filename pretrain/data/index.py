"""Megatron's `.idx` header, read and judged before megatron-core maps the files: its own reader trusts what it finds.

Layout (little endian): 9 bytes magic, u64 version, u8 dtype code, u64 S sequences, u64 D document borders, then int32
[S] lengths, int64 [S] byte offsets into the `.bin`, int64 [D] sequence numbers at which documents begin and end.
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


@dataclass(frozen=True)
class IndexHeader:
    """The fixed part of an `.idx` file. `borders` is D: documents + 1."""

    dtype: np.dtype
    sequences: int
    borders: int


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
    with path.open("rb") as stream:
        head = stream.read(HEADER_BYTES)
    if len(head) < HEADER_BYTES:
        raise DataError(f"{path} is truncated: its header needs {HEADER_BYTES} bytes, found {len(head)}; {REPAIR}")
    if head[:9] != MAGIC:
        raise DataError(
            f"{path} is not a Megatron index: its first 9 bytes are {head[:9]!r}, expected {MAGIC!r}; {REPAIR}"
        )
    version, code, sequences, borders = struct.unpack("<QBQQ", head[9:])
    if version != 1:
        raise DataError(f"{path} has index version {version} at byte 9, only version 1 is known; {REPAIR}")
    if code not in DTYPES:
        raise DataError(
            f"{path} has dtype code {code} at byte 17, expected one of {sorted(DTYPES)} (integers); {REPAIR}"
        )
    check_size(path, HEADER_BYTES + 12 * sequences + 8 * borders, f"header, {sequences} sequences, {borders} borders")
    if sequences == 0 or borders < 2:
        raise DataError(f"{path} holds no documents; prepare it again from an input that has text")
    return IndexHeader(np.dtype(DTYPES[code]), sequences, borders)


def read_index(prefix: Path) -> tuple[IndexHeader, np.ndarray, np.ndarray]:
    """Checks `prefix.idx` against itself and against the size of `prefix.bin`.

    Returns the header, the length of every document in tokens, int64 [documents], and the byte offset in the `.bin`
    at which each begins, int64 [documents]. A document may be several Megatron sequences (one a sentence); they lie
    back to back. Raises DataError naming the file and the offset of the first thing that is wrong.
    """
    path = prefix.with_name(prefix.name + ".idx")
    header = read_header(path)
    raw = np.memmap(path, mode="r", dtype=np.uint8)
    at_pointers = HEADER_BYTES + 4 * header.sequences
    at_borders = at_pointers + 8 * header.sequences
    lengths = np.frombuffer(raw, "<i4", header.sequences, HEADER_BYTES).astype(np.int64)
    pointers = np.frombuffer(raw, "<i8", header.sequences, at_pointers)
    borders = np.frombuffer(raw, "<i8", header.borders, at_borders)
    if (lengths < 0).any():
        i = int(np.argmax(lengths < 0))
        raise DataError(f"{path}: sequence {i} has length {lengths[i]} at byte {HEADER_BYTES + 4 * i}; {REPAIR}")
    ends = np.cumsum(lengths)
    expected = (ends - lengths) * header.dtype.itemsize
    if (pointers != expected).any():
        i = int(np.argmax(pointers != expected))
        raise DataError(
            f"{path}: sequence {i} points to byte {pointers[i]} of the .bin, its predecessors end at {expected[i]} "
            f"(index byte {at_pointers + 8 * i}); {REPAIR}"
        )
    if borders[0] != 0 or borders[-1] != header.sequences or (np.diff(borders) < 0).any():
        raise DataError(
            f"{path}: document borders (from byte {at_borders}) must rise from 0 to {header.sequences}; {REPAIR}"
        )
    check_size(prefix.with_name(prefix.name + ".bin"), int(ends[-1]) * header.dtype.itemsize, f"{int(ends[-1])} tokens")
    starts = np.concatenate([np.zeros(1, np.int64), ends])[borders]
    return header, np.diff(starts), starts[:-1] * header.dtype.itemsize
