"""Documents packed whole by best fit; how is told in packing.py.

What is kept of a packing is the number of sequences of each block and, in two bytes a document, which of its block's
sequences a document (or the rest of a long one) went to. Blocks are packed hundreds at a time: arrays hold the state of
all of them, so that a document takes a share of an array operation and not a turn of Python's loop.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from pretrain.data.errors import UsageError
from pretrain.data.order import Span
from pretrain.data.packing import Pieces, Row, ranges
from pretrain.data.permute import permutation_of

BLOCK, GROUP = 1024, 16
_TOGETHER = 512  # blocks packed at a time: their spaces stay in a core's cache
_FEW = 32  # blocks, for which Python's integers are quicker than arrays
_BLOCKS, _BINS = 5, 6  # apart from the purposes that packing.py and version 1 number


class Table(NamedTuple):
    """counts: int64 [blocks], sequences. bins: uint16 [documents], see module. inputs: tokens in all sequences."""

    counts: np.ndarray
    bins: np.ndarray
    inputs: int


class _Group(NamedTuple):
    """GROUP blocks that follow each other in an epoch. shuffled: int64 [n], the sequence at each place. ends: int64 [n],
    pieces up to each sequence's last. document, start, length: of the pieces, int64.
    """

    shuffled: np.ndarray
    ends: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray


def assign(rests: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Best fit, decreasing: longest first, each where least space is left, of several such the one used last.

    rests: int64 [blocks, N], sizes; those below 2 are left out. length: of a sequence. Returns which sequence of its
    block each goes to, uint16 [blocks, N], and how many sequences each block has, int64 [blocks].
    """
    blocks, size = rests.shape
    bits = size.bit_length()
    places = np.arange(size)
    by_size = np.where(rests > 1, length - rests, length) << bits | places
    by_size.sort(axis=1)
    documents = by_size & ((1 << bits) - 1)
    sizes = np.ascontiguousarray((length - (by_size >> bits)).T)
    there = sizes > 1
    # All sizes of a row of `sizes` are placed at once, one in each block. A sequence's key is the space left in it and,
    # below, a stamp that falls from row to row: of keys of enough space the smallest is the best fit, used last. Less
    # the size that is wanted, unsigned, those of too little space wrap around and come after all others. The sequence
    # that a block would open next is there already: it has most space.
    key: type[np.unsignedinteger] = np.uint32 if length << bits < 1 << 31 else np.uint64
    stamps, unopened = size - 1 - places, (1 << bits) - 1
    mask, fresh = key(unopened), key(length << bits | unopened)
    wanted = (sizes << bits).astype(key)
    keys, left = np.zeros((size + 1, blocks), key), np.empty((size + 1, blocks), key)
    every = np.arange(blocks)
    chosen_at = np.empty((unopened + 1, blocks), np.intp)  # by stamp: where the key is among all keys
    chosen_at[:] = every  # a block whose last has been placed goes on writing, to itself
    keys_flat, chosen_flat = keys.reshape(-1), chosen_at.reshape(-1)
    # Of two that are longer than half a sequence none goes to the other: those open sequences of more and more space.
    lone = int((sizes > length // 2).all(axis=1).sum())
    keys[:lone] = (length - sizes[:lone]) << bits | stamps[:lone, None]
    chosen_at[stamps[:lone]] = places[:lone, None] * blocks + every
    next_at = lone * blocks + every
    keys_flat[next_at] = fresh
    chosen_at[unopened] = next_at
    # Of those, the first have too little space for what comes next in any block.
    least = sizes.min(axis=1)
    begins = (-least[:lone]).searchsorted(least - length)
    all_there, steps = int(there.all(axis=1).sum()), int(there.any(axis=1).sum())
    used = lone
    for place in range(lone, steps):
        if (place - lone) % 8 == 0:
            used = int(next_at.max()) // blocks
        end = min(used + (place - lone) % 8 + 1, size + 1)
        some = left[begins[place] : end]
        np.subtract(keys[begins[place] : end], wanted[place], out=some)
        best = some.min(axis=0)
        stamp = best & mask
        at = stamp.astype(np.intp)
        new = at == unopened
        at *= blocks
        at += every
        chosen = chosen_flat[at]
        if place >= all_there:
            new &= there[place]
        best -= stamp
        best += key(stamps[place])
        keys_flat[chosen] = best
        chosen_at[stamps[place]] = chosen
        np.add(next_at, blocks, out=next_at, where=new)
        keys_flat[next_at] = fresh
        chosen_at[unopened] = next_at
    bins = np.empty((blocks, size), np.uint16)
    np.put_along_axis(bins, documents, (chosen_at[stamps] // blocks).astype(np.uint16).T, axis=1)
    return bins, next_at // blocks


def assign_one(rests: list[int], length: int) -> tuple[list[int], int]:
    """As `assign`, of one block."""
    bins, opened = [0] * len(rests), 0
    open_bins: dict[int, list[int]] = {}
    spaces = 0  # bit s: some sequence has space for s tokens left
    for negative, document in sorted((-size, document) for document, size in enumerate(rests) if size > 1):
        size = -negative
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            same = open_bins[space]
            chosen = same.pop()
            if not same:
                spaces ^= 1 << space
        else:
            space, chosen, opened = length, opened, opened + 1
        bins[document] = chosen
        if space > size:
            open_bins.setdefault(space - size, []).append(chosen)
            spaces |= 1 << (space - size)
    return bins, opened


def table(starts: np.ndarray, length: int) -> Table:
    """The packing of all documents. starts: int64 [documents + 1]. Memory: 2 bytes a document, 8 a block."""
    documents, block = len(starts) - 1, BLOCK
    counts, bins, inputs = np.empty(-(-documents // block), np.int64), np.empty(documents, np.uint16), 0
    for first in range(0, documents, _TOGETHER * block):
        sizes = np.diff(starts[first : first + _TOGETHER * block + 1])
        number = -(-sizes.size // block)
        if number * block > sizes.size:
            sizes = np.concatenate([sizes, np.zeros(number * block - sizes.size, np.int64)])
        whole, rests = _divided(sizes, length)
        if number < _FEW and length <= 1 << 15:
            each = [assign_one(few, length) for few in rests.reshape(number, block).tolist()]
            found, opened = np.array([few for few, _ in each], np.uint16), np.array([used for _, used in each])
        else:
            found, opened = assign(rests.reshape(number, block), length)
        counts[first // block : first // block + number] = whole.reshape(number, block).sum(axis=1) + opened
        bins[first : first + number * block] = found.reshape(-1)[: documents - first]
        inputs += int(whole.sum()) * length + int(rests[rests > 1].sum())
    return Table(counts, bins, inputs)


def _divided(sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """How many whole sequences documents give, and how many tokens are left. A last token by itself predicts nothing,
    and was predicted by the one before it: what is left may be 1, and is left out then.
    """
    whole = np.maximum(sizes - 1, 0) // length
    return whole, sizes - whole * length


class BestFit:
    """starts: as for Concatenated. known: the table, if another process has made it.

    Raises ValueError if there is nothing to predict.
    """

    of_documents = True

    def __init__(self, starts: np.ndarray, sequence_length: int, *key: int, known: Table | None = None) -> None:
        self.starts, self.sequence_length, self.key = starts, sequence_length, key
        self.table = known if known is not None else table(starts, sequence_length)
        self.windows_per_epoch = int(self.table.counts.sum())
        if self.windows_per_epoch == 0:
            raise UsageError("no document of the corpus has two tokens, nothing to predict: prepare more text")
        self.padding = 1 - self.table.inputs / (self.windows_per_epoch * sequence_length)
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], _Group] = OrderedDict()

    def row(self, sequence: int) -> Row:
        _, document, start, length = self._found(np.array([sequence]))
        return Row([Span(*each) for each in zip(document.tolist(), start.tolist(), length.tolist())])

    def pieces(self, sequences: np.ndarray) -> Pieces:
        """See Arrangement. A piece that its document goes on after is as long as a sequence, and has the next token too."""
        row, document, start, length = self._found(sequences)
        first = self.starts[document] + start
        return Pieces(row, first, length + (first + length < self.starts[document + 1]))

    def _found(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Which of `sequences`, document, start and length of all their pieces, in order."""
        epochs, places = np.divmod(np.asarray(sequences, np.int64), self.windows_per_epoch)
        parts = []
        for epoch in np.unique(epochs).tolist():
            _, ends = self._epoch(epoch)
            mine = np.flatnonzero(epochs == epoch)
            groups = ends[GROUP - 1 :: GROUP].searchsorted(places[mine], side="right")
            for group in np.unique(groups).tolist():
                rows = mine[groups == group]
                found = self._group(epoch, group)
                before = int(ends[group * GROUP - 1]) if group else 0
                bins = found.shuffled[places[rows] - before]
                begins = np.where(bins > 0, found.ends[bins - 1], 0)
                of, at = ranges(begins, found.ends[bins])
                parts.append((rows[of], found.document[at], found.start[at], found.length[at]))
        row, document, start, length = (np.concatenate(each) for each in zip(*parts))
        if len(parts) > 1:
            order = np.argsort(row, kind="stable")
            row, document, start, length = row[order], document[order], start[order], length[order]
        return row, document, start, length

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks in the epoch's order, and the sequences up to each one's last."""
        found = self._epochs.get(epoch)
        if found is None:
            count = len(self.table.counts)
            blocks = permutation_of(count, *self.key, epoch, _BLOCKS).many(np.arange(count))
            found = self._epochs[epoch] = (blocks, np.cumsum(self.table.counts[blocks]))
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return found

    def _group(self, epoch: int, group: int) -> _Group:
        found = self._groups.get((epoch, group))
        if found is None:
            blocks = self._epoch(epoch)[0][group * GROUP : (group + 1) * GROUP]
            ends, document, start, length = self._unpacked(blocks)
            number = len(ends)
            shuffled = permutation_of(number, *self.key, epoch, group, _BINS).many(np.arange(number))
            found = self._groups[epoch, group] = _Group(shuffled, ends, document, start, length)
            while len(self._groups) > 3:
                self._groups.popitem(last=False)
        return found

    def _unpacked(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The sequences of blocks, one block after the other: the fields of a _Group but the first."""
        block, documents = ranges(blocks * BLOCK, np.minimum((blocks + 1) * BLOCK, len(self.starts) - 1))
        whole, rests = _divided(self.starts[documents + 1] - self.starts[documents], self.sequence_length)
        counts = self.table.counts[blocks]
        base = np.cumsum(counts) - counts
        # A block's sequences are first those of whole pieces, in the documents' order, then those of best fit.
        owner, nth = ranges(np.zeros_like(whole), whole)
        of_block = np.bincount(block, whole, len(blocks)).astype(np.int64)
        before = np.cumsum(of_block) - of_block
        of_whole = base[block[owner]] + np.arange(len(owner)) - before[block[owner]]
        kept = np.flatnonzero(rests > 1)
        of_rest = base[block[kept]] + of_block[block[kept]] + self.table.bins[documents[kept]]
        # In a sequence the longest comes first; of equal ones the first document.
        order = np.lexsort((-rests[kept], of_rest))
        kept, of_rest = kept[order], of_rest[order]
        rest_starts = whole[kept] * self.sequence_length
        parts = (
            (of_whole, of_rest),
            (documents[owner], documents[kept]),
            (nth * self.sequence_length, rest_starts),
            (np.full(len(owner), self.sequence_length), rests[kept]),
        )
        number, document, start, length = (np.concatenate(each) for each in parts)
        order = np.argsort(number, kind="stable")
        ends = np.cumsum(np.bincount(number, minlength=int(counts.sum())))
        return ends, document[order], start[order], length[order]
