"""One rank's part of a save: what this rank holds of every tensor, one block after the other, as bytes.

    00003.data    the blocks of rank 3, in the order of their names and places, each at a multiple of 64 bytes
    00003.json    written last and sealed: what save this is a part of, how it is cut, the sums of the data, the loop's own state

Where a block lies follows from the blocks before it, and the job that reads has the very same ones, or it does not read: that is
what `fingerprint` is for.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from pretrain.checkpoint import points
from pretrain.checkpoint.blocks import CheckedReader, HashingWriter
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.planned import ALIGNMENT, as_bytes
from pretrain.checkpoint.sealed import read_sealed, write_sealed
from pretrain.checkpoint.snapshot import blocks_of

FORMAT = 1


@dataclass(frozen=True)
class Save:
    """One save, as every part of it says. number: counts the saves of a run, over restarts too.

    base: the sequence of the newest checkpoint in the shared folder when the save was begun; 0 for none.
    """

    id: str
    number: int
    step: int
    base: int
    world: int
    layout: str


@dataclass(frozen=True)
class Part:
    """What the description of a part says, but for the sums and the loop's state. blocks: see `fingerprint`."""

    save: Save
    rank: int
    blocks: str
    bytes: int


def data_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank:05d}.data"


def description(folder: Path, rank: int) -> Path:
    return folder / f"{rank:05d}.json"


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of all blocks' names, places, shapes and dtypes, and not of what is in them."""
    rows = [[name, list(offsets), list(block.shape), str(block.dtype)] for name, offsets, block in blocks_of(tensors)]
    return xxhash.xxh3_128_hexdigest(json.dumps(rows).encode())


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the data file."""
    position = 0
    for _, _, block in blocks_of(tensors):
        position += -position % ALIGNMENT + block.numel() * block.element_size()
    return position


def write(folder: Path, save: Save, rank: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Writes the part of `rank` to `folder`. Raises OSError."""
    points.reached("near: before own")
    with HashingWriter(data_file(folder, rank)) as file:
        for _, _, block in blocks_of(tensors):
            file.align(ALIGNMENT)
            file.write(as_bytes(block.contiguous()))
        file.finish()
        sums, size = bytes(file.sums), file.position
    points.reached("near: half of own")
    part = Part(save, rank, fingerprint(tensors), size)
    record = {"format": FORMAT, **asdict(part), "sums": base64.b64encode(sums).decode(), "meta": dict(meta)}
    write_sealed(description(folder, rank), record, indent=None)
    points.reached("near: after own")


def read_description(path: Path) -> tuple[Part, bytes, dict[str, Any]]:
    """(part, sums, the loop's state). Raises CheckpointError naming the file."""
    try:
        record = read_sealed(path)
        if record["format"] != FORMAT:
            raise ValueError(f"{path} has format {record['format']}, this program reads {FORMAT}")
        part = Part(Save(**record["save"]), record["rank"], record["blocks"], record["bytes"])
        return part, base64.b64decode(record["sums"]), record["meta"]
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(str(error)) from error


def open_part(folder: Path, rank: int) -> CheckedReader:
    """The data of a part, every block of which is checked when it is read. Raises CheckpointError."""
    part, sums, _ = read_description(description(folder, rank))
    path = data_file(folder, rank)
    try:
        return CheckedReader(path, part.bytes, sums, f" (the part of rank {rank})")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def damage(folder: Path, rank: int) -> str:
    """What is wrong with a part; "" if every bit of it is as it was written."""
    try:
        with open_part(folder, rank) as file:
            return next((str(fault) for fault in file.check()), "")
    except (CheckpointError, OSError) as error:
        return str(error)


@torch.no_grad()
def fill(folder: Path, rank: int, tensors: Mapping[str, Tensor]) -> None:
    """Fills what this rank holds, in place, from a part with the same fingerprint.

    Raises CheckpointError; the tensors are then partly filled.
    """
    position = 0
    with open_part(folder, rank) as file:
        for _, _, block in blocks_of(tensors):
            position += -position % ALIGNMENT
            direct = block.is_cpu and block.is_contiguous()
            target = block if direct else torch.empty(block.shape, dtype=block.dtype)
            file.readinto(as_bytes(target), position)
            position += block.numel() * block.element_size()
            if not direct:
                block.copy_(target)
