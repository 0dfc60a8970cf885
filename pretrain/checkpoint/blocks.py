"""Files that are hashed block by block from memory as they are written, and checked block by block as they are read.

Beside `NAME.data` stands `NAME.sums` with one record a block of 4 MiB: its xxh3-128 hash, and the words of an extended Hamming
code (R. W. Hamming, "Error detecting and error correcting codes", 1950) over its 64-bit words. The hash says that a block is
damaged; the code then says whether one flipped bit explains it, and which. That tells failing hardware from a torn write.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pretrain.checkpoint.errors import CheckpointError

BLOCK = 4 << 20
DEPTH = 8  # blocks that may wait to be written: the two threads need not take turns
READERS = 2  # threads that read and hash
AHEAD = 32 << 20  # bytes after which the system is told to begin putting them on disk
_LEVELS = (BLOCK // 8).bit_length() - 1  # bits in the number of a word
_ROW = 2048
_HASH = 16
RECORD = _HASH + 8 * (_LEVELS + 1)

Words = NDArray[np.uint64]


def code(block: Words) -> Words:
    """The code of BLOCK / 8 words: the exclusive or of all words whose number has bit k set, for each k; then of all words.

    block: those of them that may not be zero, from the first on; their number is a power of two.
    """
    parts = [np.uint64(0)] * (_LEVELS - block.size.bit_length() + 1)
    words = block
    if block.size > _ROW:
        # The upper bits of a word's number are those of its row, so two passes over the block do for all of them.
        rows = block.reshape(-1, _ROW)
        parts += _halved(np.bitwise_xor.reduce(rows, axis=1))[:-1]
        words = np.bitwise_xor.reduce(rows, axis=0)
    return np.array([*parts, *_halved(words)], dtype=np.uint64)


def _halved(words: Words) -> list[np.uint64]:
    parts = []
    while words.size > 1:
        low, high = words[: words.size // 2], words[words.size // 2 :]
        parts.append(np.bitwise_xor.reduce(high))
        words = low ^ high
    return [*parts, words[0]]


def _words(size: int) -> int:
    """The least power of two of words that hold so many bytes."""
    return 1 << max(0, (-(-size // 8) - 1).bit_length())


def flipped_bit(found: Words, wanted: Words) -> tuple[int, int] | None:
    """(byte, bit) of the only bit in which two blocks can differ, by their codes; None when more than one must."""
    difference = found ^ wanted
    lane = int(difference[-1])
    if lane == 0 or lane & (lane - 1):
        return None
    word = 0
    for part in difference[:-1].tolist():
        if part not in (0, lane):
            return None
        word = 2 * word + (part == lane)
    bit = lane.bit_length() - 1
    return word * 8 + bit // 8, bit % 8


class DamagedBlock(CheckpointError):
    """Bytes `start` to `end` (exclusive) of a file are not as they were written."""

    def __init__(self, message: str, start: int, end: int):
        super().__init__(message)
        self.start, self.end = start, end

    def __reduce__(self) -> tuple[Any, ...]:  # it travels to the other ranks
        return DamagedBlock, (str(self), self.start, self.end)


class HashingWriter:
    """A new file at `path` (which must not exist), and its sums. A thread writes while this one hashes.

    What fills a block goes to the file from where it lies; only the ends of tensors are gathered in a buffer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self.sums = bytearray()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._buffers = [bytearray(BLOCK), bytearray(BLOCK)]
        self._leaving: list[Future[None] | None] = [None, None]  # the write of what each buffer held
        self._written = self._begun = 0  # bytes that the system has, and those of them that it was told to put on disk
        self._pool = ThreadPoolExecutor(1, "checkpoint-writer")
        self._writes: deque[Future[None]] = deque()

    def write(self, data: memoryview) -> None:
        """Appends bytes, which are the caller's again when this returns. Raises OSError naming the file."""
        at = 0
        straight = False
        while at < len(data):
            offset = self.position % BLOCK
            count = min(BLOCK - offset, len(data) - at)
            self.position += count
            if count == BLOCK:
                self._flush(data[at : at + BLOCK], BLOCK)
                straight = True
            else:
                if offset == 0 and (leaving := self._leaving[0]) is not None:
                    leaving.result()
                memoryview(self._buffers[0])[offset : offset + count] = data[at : at + count]
                if self.position % BLOCK == 0:
                    self._flush_buffer(BLOCK)
            at += count
        if straight:
            self._wait()

    def align(self, multiple: int) -> None:
        """Zeros up to the next multiple of so many bytes."""
        self.write(memoryview(bytes(-self.position % multiple)))

    def _flush_buffer(self, size: int) -> None:
        block = memoryview(self._buffers[0])
        block[size : 8 * _words(size)] = bytes(8 * _words(size) - size)
        self._leaving[0] = self._flush(block, size)
        self._buffers.reverse()
        self._leaving.reverse()

    def _flush(self, block: memoryview, size: int) -> Future[None]:
        """Hashes `size` bytes and has them written. What follows them in `block`, up to a power of two of words, is zero."""
        while len(self._writes) >= DEPTH:
            self._writes.popleft().result()
        self._writes.append(writing := self._pool.submit(self._write, block, size))
        self.sums += xxhash.xxh3_128_digest(memoryview(block)[:size])
        self.sums += code(np.frombuffer(block, np.uint64, _words(size))).tobytes()
        return writing

    def _write(self, block: memoryview, size: int) -> None:
        view = block[:size]
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._written += size
        if self._written - self._begun >= AHEAD:
            # Of pages that are not on disk yet this advice starts the writing, and returns: the disk need not wait for fsync.
            os.posix_fadvise(self._descriptor, self._begun, self._written - self._begun, os.POSIX_FADV_DONTNEED)
            self._begun = self._written

    def _wait(self) -> None:
        while self._writes:
            self._writes.popleft().result()

    def finish(self) -> None:
        """Everything is on disk when this returns (the name is not: that takes an fsync of the folder)."""
        if self.position % BLOCK:
            self._flush_buffer(self.position % BLOCK)
        self._wait()
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> HashingWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class CheckedReader:
    """Reads a file of which `sums` is known. Every block that a read touches is checked first.

    Two threads read and hash the blocks that a tensor fills, so that the disk does not wait for a hash.
    """

    def __init__(self, path: Path, size: int, sums: bytes, origin: str = "") -> None:
        """size: in bytes, when it was written. origin: who wrote it, for messages. Raises CheckpointError if sizes differ."""
        self.path, self.size, self.sums, self.origin = path, size, sums, origin
        self._file = path.open("rb", buffering=0)
        found = os.fstat(self._file.fileno()).st_size
        if found != size:
            self._file.close()
            raise CheckpointError(
                f"{path} has {found} bytes instead of {size}: cut off, or not the file that was written"
            )
        self._block = bytearray(BLOCK)
        self._holds = -1
        self._pool = ThreadPoolExecutor(READERS, "checkpoint-reader")

    def readinto(self, target: memoryview, start: int) -> None:
        """Fills `target` from byte `start` on. Raises CheckpointError naming file, block and kind of damage."""
        at = 0
        reads: list[Future[None]] = []
        try:
            while at < len(target):
                index, offset = divmod(start + at, BLOCK)
                count = min(BLOCK - offset, len(target) - at)
                part = target[at : at + count]
                if count == self._size_of(index):
                    reads.append(self._pool.submit(self._fill, index, part))  # no copy
                else:
                    self._load(index)
                    part[:] = memoryview(self._block)[offset : offset + count]
                at += count
        finally:
            wait(reads)  # whatever happens, nobody writes to `target` after this
        for read in reads:
            read.result()

    def check(self) -> list[DamagedBlock]:
        """Reads every block; returns those that are damaged."""
        found = []
        for index in range(-(-self.size // BLOCK)):
            try:
                self._load(index)
            except DamagedBlock as error:
                found.append(error)
        return found

    def _size_of(self, index: int) -> int:
        return min(BLOCK, self.size - index * BLOCK)

    def _load(self, index: int) -> None:
        if self._holds == index:
            return
        self._holds = -1
        self._fill(index, memoryview(self._block)[: self._size_of(index)])
        self._holds = index

    def _fill(self, index: int, view: memoryview) -> None:
        """Reads a whole block and checks it."""
        start, size = index * BLOCK, len(view)
        done = 0
        while done < size:
            count = os.preadv(self._file.fileno(), [view[done:]], start + done)
            if not count:
                raise CheckpointError(f"{self.path} ends at byte {start + done} instead of {self.size}")
            done += count
        record = self.sums[index * RECORD : (index + 1) * RECORD]
        if xxhash.xxh3_128_digest(view) != record[:_HASH]:
            blocks = -(-self.size // BLOCK)
            where = f"{self.path}{self.origin}: block {index + 1} of {blocks} (bytes {start} to {start + size - 1})"
            kind = _diagnosis(view, record, start)
            raise DamagedBlock(f"{where} is damaged: {kind}", start, start + size)

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self._file.close()

    def __enter__(self) -> CheckedReader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _diagnosis(block: memoryview, record: bytes, start: int) -> str:
    size = len(block)
    whole = bytearray(8 * _words(size))
    whole[:size] = block
    wanted = np.frombuffer(record[_HASH:], np.uint64)
    place = flipped_bit(code(np.frombuffer(whole, np.uint64)), wanted)
    if place is not None and place[0] < size:
        byte, bit = place
        whole[byte] ^= 1 << bit
        if xxhash.xxh3_128_digest(memoryview(whole)[:size]) == record[:_HASH]:
            return f"bit {bit} of byte {start + byte} is flipped, and nothing else; memory, disk or network did that"
    zeros = size - len(bytes(block).rstrip(b"\0"))
    if zeros >= 512:
        return f"it ends in {zeros} zero bytes; a write that never reached the disk"
    return "many bits differ; a torn write, or another file's bytes"
