"""One lane of a streamed source: its units' documents, tokenised and cut into windows, from any position on.

A source's units are dealt to lanes: in epoch e, whose permutation of the units is drawn by (key, e), lane v has those at the
places v, v + V, v + 2V ... of V lanes. The rows of a block are shuffled by (key, e, unit, block). A lane's documents, each
as bos, tokens, eos, make a stream without end that is cut into windows of T inputs, of which the last predicts the first of
the next, as packing.Concatenated does it. All of this hangs on the text, the tokenizer and the key, not on who reads the lane
or when. How many tokens a document has is known only after it was read, so a lane is read forward; its position says where
the next window begins, and to go on from one, one block is read and one document tokenised again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pretrain.data.encode import digest_of, split_of
from pretrain.data.errors import DataError
from pretrain.data.order import permutation
from pretrain.data.permute import permutation_of
from pretrain.data.streaming_units import Units
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.writer import dtype_for

_UNITS, _ROWS = 7, 8  # apart from the purposes that packing numbers
_EMPTY = 3  # epochs without a document after which a lane gives up


class Position(NamedTuple):
    """Where a lane's window `number` begins: at token `token` of the document in place `row` of the shuffled block `block` of
    the lane's unit `place` of this epoch.
    """

    number: int = 0
    epoch: int = 0
    place: int = 0
    block: int = 0
    row: int = 0
    token: int = 0


class Piece(NamedTuple):
    """`length` tokens of a document from token `start` on. unit, at: see Units.where. size: of the document, in tokens."""

    unit: int
    at: int
    start: int
    length: int
    size: int


@dataclass(frozen=True)
class Window:
    """ids: [T + 1], the last is a target only. begins: int64, where in it documents begin (a place from 1 to T). pieces: of its
    inputs. after: the lane's position behind it. bad: rows that were left out since the window before.
    """

    ids: np.ndarray
    begins: np.ndarray
    pieces: tuple[Piece, ...]
    after: Position
    lane: int
    bad: int = 0

    @property
    def number(self) -> int:
        return self.after.number - 1


@dataclass
class _Document:
    ids: np.ndarray
    unit: int
    at: int
    place: tuple[int, int, int, int]  # epoch, place, block, row
    bad: int


@dataclass(frozen=True)
class Recipe:
    """What a source's lanes have in common. key: of the order. shuffle: of units and rows. held_out: documents that are left
    out for validation, (seed, share).
    """

    units: Units
    tokenizer: Tokenizer
    lanes: int
    sequence_length: int
    key: tuple[int, ...]
    shuffle: bool = True
    held_out: tuple[int, float] = (0, 0.0)

    def takes(self, text: str) -> bool:
        """Whether a document is trained on."""
        seed, share = self.held_out
        return bool(text) and (not share or split_of(digest_of(text.encode()), seed, share) == "train")


class Lane:
    """Iterating yields Windows without end, the first of which is number `position.number`. Raises DataError."""

    def __init__(self, recipe: Recipe, lane: int, position: Position) -> None:
        assert 0 <= lane < recipe.lanes <= recipe.units.count
        self.recipe, self.lane, self.position = recipe, lane, position
        self._dtype = dtype_for(recipe.tokenizer.vocabulary_size)
        self._documents = self._read(position)
        self._held: list[_Document] = []
        self._have = -position.token  # tokens held from the position on

    def __iter__(self) -> Lane:
        return self

    def __next__(self) -> Window:
        length, first = self.recipe.sequence_length, self.position.token
        while self._have < length + 1:
            document = next(self._documents)
            self._held.append(document)
            self._have += len(document.ids)
        ids = np.empty(length + 1, self._dtype)
        begins, pieces, taken, bad = [], [], 0, 0
        for document in self._held:
            size = min(len(document.ids) - first, length + 1 - taken)
            ids[taken : taken + size] = document.ids[first : first + size]
            if first == 0 and taken:
                begins.append(taken)
            if taken < length:
                piece = min(size, length - taken)
                pieces.append(Piece(document.unit, document.at, first, piece, len(document.ids)))
                bad += document.bad if first == 0 else 0
            taken, first = taken + size, 0
            if taken > length:
                break
        self._advance(length)
        return Window(ids, np.array(begins, np.int64), tuple(pieces), self.position, self.lane, bad)

    def _advance(self, length: int) -> None:
        self._have -= length
        token = self.position.token + length
        while token >= len(self._held[0].ids):
            token -= len(self._held.pop(0).ids)
        self.position = Position(self.position.number + 1, *self._held[0].place, token)

    def _read(self, position: Position) -> Iterator[_Document]:
        """The lane's documents from the position's on."""
        recipe = self.recipe
        count, bos, eos = recipe.units.count, recipe.tokenizer.bos, recipe.tokenizer.eos
        _, epoch, place, block, row, _ = position
        lost, last = 0, epoch
        code = {"uint16": "H", "int32": "i"}[self._dtype.name]
        while True:
            for where in range(place, places(count, self.lane, recipe.lanes)):
                unit = where * recipe.lanes + self.lane
                if recipe.shuffle:
                    unit = permutation_of(count, *recipe.key, epoch, _UNITS)(unit)
                for number, found in enumerate(recipe.units.blocks(unit, block), block):
                    lost += found.bad if row == 0 else 0
                    rows = range(len(found))
                    if recipe.shuffle:
                        rows = permutation(len(rows), *recipe.key, epoch, unit, number, _ROWS).tolist()
                    for turn in range(row, len(rows)):
                        text = found.read(rows[turn])
                        if text is None or not recipe.takes(text.text):
                            lost += text is None
                            continue
                        found_ids = recipe.tokenizer.encode(text.text)
                        # In one call, several times as quick as numpy's conversion of a list.
                        packed = struct.pack(f"<{len(found_ids) + 2}{code}", bos, *found_ids, eos)
                        ids = np.frombuffer(packed, self._dtype)
                        yield _Document(ids, unit, text.at, (epoch, where, number, turn), lost)
                        lost, last = 0, epoch
                    row = 0
                block = 0
            place, epoch = 0, epoch + 1
            if epoch - last > _EMPTY:
                raise DataError(
                    f"lane {self.lane} of {recipe.lanes} found no text in {_EMPTY} epochs ({lost} rows of it are "
                    "unreadable); name the right files and stream.text_field, or set fewer stream.lanes"
                )


def places(units: int, lane: int, lanes: int) -> int:
    """Units that a lane has in an epoch."""
    return -(-(units - lane) // lanes)
