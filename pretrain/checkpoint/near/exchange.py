"""Parts sent from rank to rank: to the buddy at a save, to those who lack them at a restart.

What leaves is read through its sums, what arrives is hashed anew and compared: a flipped bit on the way, or in either memory,
does not arrive unnoticed. Files that cannot be read or written end nothing here: their ranks go on with the motions, because
the others wait for their messages, and say afterwards what went wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.checkpoint import points
from pretrain.checkpoint.blocks import BLOCK, CheckedReader, HashingWriter
from pretrain.checkpoint.durable import fsync_folder, write_bytes
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.near.parts import Save, data_file, description, open_part, read_description


class Move(NamedTuple):
    """The part of rank `part` goes from rank `source` to rank `target`."""

    part: int
    source: int
    target: int


def exchange(folder: Path, save: Save, moves: Sequence[Move], rank: int, group: dist.ProcessGroup | None) -> list[str]:
    """Carries out the moves between the ranks' folders of a save. Collective over those who take part in one.

    Returns what failed on this rank, a line for each part that should have come. Raises what torch.distributed raises when a
    peer is gone.
    """
    going = [_Going(folder, move) for move in moves if move.source == rank]
    coming = [_Coming(folder, save, move) for move in moves if move.target == rank]
    both: list[_Going | _Coming] = [*going, *coming]
    number = 0
    while True:
        messages = [(each, each.message(number)) for each in both]
        pending: list[Any] = []
        for each, message in messages:
            if message is not None and isinstance(each, _Going):
                pending.append(dist.isend(message, each.move.target, group=group, tag=each.move.part))
            elif message is not None:
                pending.append(dist.irecv(message, each.move.source, group=group, tag=each.move.part))
        if not pending:
            break
        for work in pending:
            work.wait()
        for each, message in messages:
            if message is not None and isinstance(each, _Coming):
                each.arrived(number, message)
        number += 1
    for each in both:
        each.close()
    return [f"the part of rank {one.move.part}: {one.fault}" for one in coming if one.fault]


# Message 0 is the lengths of description and data, 1 the description, the rest the data in blocks.


class _Going:
    def __init__(self, folder: Path, move: Move) -> None:
        self.move = move
        self.text, self.size = b"", 0
        self.buffer = bytearray(BLOCK)
        self.reader: CheckedReader | None = None
        with contextlib.suppress(OSError, CheckpointError):  # then nothing is sent, and who waits for it says so
            self.reader = open_part(folder, move.part)
            self.text, self.size = description(folder, move.part).read_bytes(), self.reader.size

    def message(self, number: int) -> Tensor | None:
        if number == 0:
            return torch.tensor([len(self.text), self.size])
        if number == 1:
            return _bytes(bytearray(self.text))
        start = (number - 2) * BLOCK
        view = memoryview(self.buffer)[: max(0, min(BLOCK, self.size - start))]
        if view and self.reader is not None:
            with contextlib.suppress(OSError, CheckpointError):  # the sums will not fit where it arrives
                self.reader.readinto(view, start)
        return _bytes(view)

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()


class _Coming:
    def __init__(self, folder: Path, save: Save, move: Move) -> None:
        self.folder, self.save, self.move = folder, save, move
        self.fault = ""
        self.lengths = [0, 0]
        self.arriving = folder / f".{move.part:05d}.arriving"
        self.buffer = bytearray(BLOCK)
        self.sums = b""
        self.writer: HashingWriter | None = None

    def message(self, number: int) -> Tensor | None:
        if number == 0:
            return torch.zeros(2, dtype=torch.int64)
        if number == 1:
            return _bytes(bytearray(self.lengths[0]))
        return _bytes(memoryview(self.buffer)[: max(0, min(BLOCK, self.lengths[1] - (number - 2) * BLOCK))])

    def arrived(self, number: int, message: Tensor) -> None:
        """Takes a message. What fails is kept in `fault`; later messages are then let pass."""
        if self.fault:
            return
        try:
            self._take(number, message)
        except (OSError, CheckpointError) as error:
            self.fault = str(error)

    def _take(self, number: int, message: Tensor) -> None:
        if number == 0:
            self.lengths = [int(length) for length in message]
            if not self.lengths[0]:
                raise CheckpointError(f"rank {self.move.source} could not read it")
            return
        if number == 1:
            self._begin(message)
        elif self.writer is not None:
            self.writer.write(memoryview(message.numpy().data))
        if self.writer is not None and self.writer.position == self.lengths[1]:
            self._finish(self.writer)

    def _begin(self, text: Tensor) -> None:
        points.reached("near: before the buddy's")
        write_bytes(self.arriving, bytes(text.numpy().data))
        part, self.sums, _ = read_description(self.arriving)
        if (part.save, part.rank, part.bytes) != (self.save, self.move.part, self.lengths[1]):
            raise CheckpointError(f"rank {self.move.source} sent another one")
        # What may be there is no good, or nobody would send; the description goes first, it is what makes a part.
        for path in (description(self.folder, self.move.part), data_file(self.folder, self.move.part)):
            path.unlink(missing_ok=True)
        self.writer = HashingWriter(data_file(self.folder, self.move.part))

    def _finish(self, writer: HashingWriter) -> None:
        writer.finish()
        if bytes(writer.sums) != self.sums:
            raise CheckpointError("it was damaged in memory or on its way")
        points.reached("near: half of the buddy's")
        self.arriving.replace(description(self.folder, self.move.part))
        fsync_folder(self.folder)
        points.reached("near: after the buddy's")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        with contextlib.suppress(OSError):
            self.arriving.unlink(missing_ok=True)


def _bytes(buffer: bytearray | memoryview) -> Tensor | None:
    """The buffer as a tensor on the same memory; None if it is empty."""
    return torch.frombuffer(buffer, dtype=torch.uint8) if len(buffer) else None
