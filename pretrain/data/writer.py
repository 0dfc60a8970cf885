"""Writing a Megatron `.bin`/`.idx` pair in memory that does not grow with it.

megatron-core's own builder keeps every length, offset and border in Python lists until the end, some hundred bytes a
sequence. Here lengths go to their final place in the index as they come, since they are what follows its header; offsets are
computed from them when everything is known. The bytes are the same (tests/oracles/test_megatron_formats.py).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import DTypeLike

from pretrain.data.errors import UsageError
from pretrain.data.index import DTYPES, HEADER_BYTES, pack_header

BLOCK = 1 << 17  # sequences whose offsets are computed at a time
_LONGEST = np.iinfo(np.int32).max

Integers = np.ndarray | Sequence[int]


def dtype_for(vocabulary_size: int) -> np.dtype:
    """The type that Megatron picks for token ids of a vocabulary of this size: uint16 below 65500, then int32."""
    return np.dtype(np.uint16 if vocabulary_size < 65500 else np.int32)


class _Writer:
    """As a context manager: finishes when the block ends, and leaves nothing behind if the block raises."""

    finished = False

    def finish(self) -> None:
        raise NotImplementedError

    def abandon(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self.finished:
                self.finish()
        finally:
            self.abandon()


class IndexWriter(_Writer):
    """Writes `prefix.idx`, which appears under that name when `finish` has completed it.

    dtype: of the token ids in the `.bin`. modes: whether each sequence has a mode (Megatron's multimodal data). Raises
    UsageError for a dtype that Megatron has no code for, or a pair that is there already.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike, *, modes: bool = False) -> None:
        prefix = Path(prefix)
        self.path = prefix.with_name(prefix.name + ".idx")
        self.dtype = np.dtype(dtype)
        if self.dtype.type not in DTYPES.values():
            known = ", ".join(np.dtype(each).name for each in DTYPES.values())
            raise UsageError(f"a Megatron index has no code for token ids of {self.dtype}: choose one of {known}")
        if self.path.exists():
            raise UsageError(f"{self.path} exists: remove it, or write under another prefix")
        self.sequences = self.documents = self.tokens = 0
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._file = self._partial.open("w+b", buffering=1 << 20)
        self._file.seek(HEADER_BYTES)
        self._modes = _spill(self.path) if modes else None
        self._borders: IO[bytes] | None = None  # as long as each document is one sequence, they are known without

    def add(self, lengths: Integers, sequences: Integers | None = None, modes: Integers | None = None) -> None:
        """Adds documents. lengths: tokens of each sequence. sequences: how many of these each document has; without it
        each sequence is a document. modes: of each sequence, 0 without it.

        Raises ValueError for numbers that the format cannot hold, or that do not add up.
        """
        lengths = _integers(lengths, "lengths", _LONGEST)
        if modes is not None and self._modes is None:
            raise UsageError("modes were given to an index without: pass `modes=True` when opening it")
        counts = None if sequences is None else _integers(sequences, "sequences", len(lengths))
        if counts is not None and int(counts.sum()) != len(lengths):
            raise UsageError(f"documents of {int(counts.sum())} sequences were given {len(lengths)} lengths")
        if self._modes is not None:
            kinds = np.zeros(len(lengths), np.int8) if modes is None else _integers(modes, "modes", 127)
            if len(kinds) != len(lengths):
                raise UsageError(f"{len(lengths)} sequences were given {len(kinds)} modes")
            self._modes.write(kinds.astype("i1").tobytes())
        if counts is not None and self._borders is None and (counts != 1).any():
            self._borders = _spill(self.path)
            for first in range(0, self.sequences + 1, BLOCK):
                _write(self._borders, np.arange(first, min(first + BLOCK, self.sequences + 1)), "<i8")
        if self._borders is not None:
            ends = np.cumsum(counts) if counts is not None else np.arange(1, len(lengths) + 1)
            _write(self._borders, self.sequences + ends, "<i8")
        _write(self._file, lengths, "<i4")
        self.documents += len(lengths) if counts is None else len(counts)
        self.sequences += len(lengths)
        self.tokens += int(lengths.sum())

    def finish(self) -> None:
        """Completes the index."""
        self._file.flush()
        offset = 0
        with self._partial.open("rb") as written:
            written.seek(HEADER_BYTES)
            for first in range(0, self.sequences, BLOCK):
                count = min(BLOCK, self.sequences - first)
                lengths = np.frombuffer(written.read(4 * count), "<i4").astype(np.int64)
                ends = offset + np.cumsum(lengths) * self.dtype.itemsize
                _write(self._file, ends - lengths * self.dtype.itemsize, "<i8")
                offset = int(ends[-1])
        if self._borders is None:
            for first in range(0, self.sequences + 1, BLOCK):
                _write(self._file, np.arange(first, min(first + BLOCK, self.sequences + 1)), "<i8")
        for spilled in (self._borders, self._modes):
            if spilled is not None:
                spilled.seek(0)
                while block := spilled.read(1 << 20):
                    self._file.write(block)
                spilled.close()
        self._file.seek(0)
        self._file.write(pack_header(self.dtype, self.sequences, self.documents + 1))
        self._file.close()
        self._partial.replace(self.path)
        self.finished = True

    def abandon(self) -> None:
        """Removes what was written, unless it is finished."""
        if self.finished:
            return
        for file in (self._file, self._borders, self._modes):
            if file is not None:
                with contextlib.suppress(OSError):  # no space for what is still buffered
                    file.close()
        self._partial.unlink(missing_ok=True)


class PairWriter(_Writer):
    """Writes `prefix.bin` and `prefix.idx`; there is an `.idx` only once the pair is complete. Until then they are
    `.partial` files, which the next attempt replaces.

    It does not call fsync: who needs the pair to outlive a power cut syncs the two files. Raises as IndexWriter.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike, *, modes: bool = False) -> None:
        prefix = Path(prefix)
        self.bin_path = prefix.with_name(prefix.name + ".bin")
        self.index = IndexWriter(prefix, dtype, modes=modes)
        self.dtype = self.index.dtype
        self._stored = self.dtype.newbyteorder("<")
        self._partial = self.bin_path.with_name(self.bin_path.name + ".partial")
        self._file = self._partial.open("wb", buffering=1 << 20)

    @property
    def documents(self) -> int:
        """Documents so far."""
        return self.index.documents

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self.index.tokens

    def add(
        self, ids: np.ndarray, lengths: Integers, sequences: Integers | None = None, modes: Integers | None = None
    ) -> None:
        """Adds documents, whose token ids `ids`, integers [sum of lengths], lie end to end. Others: see IndexWriter.add.

        Raises ValueError for an id that the pair's dtype cannot hold, or lengths that do not add up to the ids.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise UsageError(f"token ids must be integers in one row, got {ids.dtype} of shape {ids.shape}")
        total = int(np.sum(lengths, dtype=np.int64))
        if total != len(ids):
            raise UsageError(f"lengths add up to {total} tokens, but there are {len(ids)} token ids")
        if ids.size and not np.can_cast(ids.dtype, self.dtype, "safe"):
            bounds = np.iinfo(self.dtype)
            for found in (int(ids.min()), int(ids.max())):
                if not bounds.min <= found <= bounds.max:
                    raise UsageError(f"token id {found} does not fit {self.dtype} ({bounds.min} to {bounds.max})")
        self.index.add(lengths, sequences, modes)
        _write(self._file, ids, self._stored)

    def finish(self) -> None:
        """Completes the pair."""
        self._file.close()
        self._partial.replace(self.bin_path)
        try:
            self.index.finish()
        except BaseException:
            self.bin_path.unlink()
            raise
        self.finished = True

    def abandon(self) -> None:
        """Removes what was written, unless it is finished."""
        if not self.finished:
            with contextlib.suppress(OSError):
                self._file.close()
            self.index.abandon()
            self._partial.unlink(missing_ok=True)


def _integers(values: Integers, name: str, largest: int) -> np.ndarray:
    array = np.asarray(values)
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UsageError(f"{name} must be integers in one row, got {array.dtype} of shape {array.shape}")
    for found in (int(array.min()), int(array.max())):
        if not 0 <= found <= largest:
            raise UsageError(f"{name} must lie from 0 to {largest}, got {found}")
    return array.astype(np.int64, copy=False)


def _spill(path: Path) -> IO[bytes]:
    # Beside the index, where there is space for it, and without a name: nothing is left of it whatever happens.
    return tempfile.TemporaryFile(dir=path.parent)


def _write(file: IO[Any], values: np.ndarray, dtype: DTypeLike) -> None:
    if values.size:
        file.write(np.ascontiguousarray(values, dtype).data)
