"""Brings every matrix together on the rank that works on it, and the result back to all that hold a part of it.

Rounds of a few matrices a rank. While one round is worked on, the next one's pieces arrive and the last one's results leave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.newton_schulz import cost
from parallel.layout import Box, Cuts, boxes, local
from pretrain.optim.assignment import Assigned, Span, assign, tasks
from pretrain.optim.matrices import Matrix


class Part(NamedTuple):
    """A parameter (plain, or sharded by FSDP2), how it was cut before that, and its matrices."""

    parameter: Tensor
    cuts: Cuts
    matrices: tuple[Matrix, ...]


class Piece(NamedTuple):
    """A block of this rank's own tensor of a part."""

    part: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    matrix: Matrix

    def of(self, tensor: Tensor) -> Tensor:
        return _view(tensor, (self.offsets, self.sizes))


class Slot(NamedTuple):
    """A block of one of the matrices that this rank works on in a round."""

    place: int
    span: Span


class Round(NamedTuple):
    """What this rank does in a round. Lists are in the order of the ranks they go to or come from; counts: elements for each.

    last: parts that are sent from in no later round.
    """

    send: list[Piece]
    send_counts: list[int]
    receive: list[Slot]
    receive_counts: list[int]
    owned: list[Matrix]
    give: list[Slot]
    give_counts: list[int]
    take: list[Piece]
    take_counts: list[int]
    last: set[int]


class Exchange:
    """parts: this rank's, the same ones in the same order on all ranks of the group. dtype: of what travels.

    Collective over the group, when it is made and in `run`. bucket: elements that a rank works on in a round, at least.
    """

    def __init__(self, parts: Sequence[Part], group: dist.ProcessGroup | None, dtype: torch.dtype, bucket: int):
        self.group, self.dtype = group, dtype
        self.rank = 0 if group is None else dist.get_rank(group)
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.device = parts[0].parameter.device if parts else torch.device("cpu")
        own = [boxes(part.parameter, part.cuts) for part in parts]
        spans = [[(box.whole, box.sizes) for box in each] for each in own]
        held: list[Any] = [spans]
        if group is not None:
            held = [None] * self.ranks
            dist.all_gather_object(held, spans, group=group)
        found = tasks([part.matrices for part in parts], held, cost)
        self.assigned = assign(found, self.ranks, bucket)
        self.rounds = self._rounds(own)

    def _rounds(self, own: list[list[Box]]) -> list[Round]:
        count = max((one.round for one in self.assigned), default=-1) + 1
        made = [self._round([one for one in self.assigned if one.round == number], own) for number in range(count)]
        seen: set[int] = set()
        for each in reversed(made):
            each.last.update({piece.part for piece in each.send} - seen)
            seen |= each.last
        return made

    def _round(self, assigned: list[Assigned], own: list[list[Box]]) -> Round:
        send: list[list[Piece]] = [[] for _ in range(self.ranks)]
        take: list[list[Piece]] = [[] for _ in range(self.ranks)]
        receive: list[list[Slot]] = [[] for _ in range(self.ranks)]
        give: list[list[Slot]] = [[] for _ in range(self.ranks)]
        owned: list[Matrix] = []
        for (part, matrix, pieces, _), owner, cells, _ in assigned:
            mine = owner == self.rank
            for holder, span in cells:
                if holder == self.rank:
                    send[owner].append(_piece(part, matrix, span, own[part]))
                if mine:
                    receive[holder].append(Slot(len(owned), span))
            for holder, spans in pieces.items():
                for span in spans:
                    if holder == self.rank:
                        take[owner].append(_piece(part, matrix, span, own[part]))
                    if mine:
                        give[holder].append(Slot(len(owned), span))
            if mine:
                owned.append(matrix)

        def flat(lists: list[list[Any]]) -> tuple[list[Any], list[int]]:
            counts = [sum(_count(entry) for entry in each) for each in lists]
            return [entry for each in lists for entry in each], counts

        return Round(*flat(send), *flat(receive), owned, *flat(give), *flat(take), set())

    @torch.no_grad()
    def run(
        self,
        source: Callable[[int], Tensor],
        work: Callable[[Tensor], Tensor],
        apply: Callable[[list[Piece], list[Tensor]], None],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """source: gives, for this rank's own tensor of a part, what is sent of it; asked once.

        work: matrices [n, rows, columns] -> results. apply: takes the results for pieces of this rank's tensors. meanwhile: done
        while the first pieces are on their way.
        """
        if self.ranks == 1:
            meanwhile()
            self._alone(source, work, apply)
            return
        asked: dict[int, Tensor] = {}
        coming = self._gather(0, source, asked) if self.rounds else None
        meanwhile()
        leaving: tuple[Any, Tensor, Round] | None = None
        for number, this in enumerate(self.rounds):
            assert coming is not None
            arrived, coming = coming, None
            if number + 1 < len(self.rounds):
                coming = self._gather(number + 1, source, asked)
            given = self._work(this, _wait(*arrived), work)
            going = self._move(given, this.take_counts, this.give_counts)
            if leaving is not None:
                self._apply(*leaving, apply)
            leaving = (*going, this)
        if leaving is not None:
            self._apply(*leaving, apply)

    def _alone(
        self,
        source: Callable[[int], Tensor],
        work: Callable[[Tensor], Tensor],
        apply: Callable[[list[Piece], list[Tensor]], None],
    ) -> None:
        """As `run`, on one rank: what travels nowhere is not packed, but brought to its matrix's place and applied from there.

        A part at a time: memory that is free again at once is used again, and need not be mapped anew.
        """
        asked: dict[int, Tensor] = {}
        for this in self.rounds:
            stacks = _Stacks(this.owned, self.dtype, self.device)
            for part, pairs in groupby(zip(this.send, this.receive), lambda pair: pair[0].part):
                if part not in asked:
                    asked[part] = source(part)
                pieces, slots = zip(*pairs)
                torch._foreach_copy_([stacks.of(slot) for slot in slots], [piece.of(asked[part]) for piece in pieces])
                if part in this.last:
                    del asked[part]
            stacks.work(work)
            for _, pairs in groupby(zip(this.take, this.give), lambda pair: pair[0].part):
                pieces, slots = zip(*pairs)
                apply(list(pieces), [stacks.of(slot) for slot in slots])

    def _gather(self, number: int, source: Callable[[int], Tensor], asked: dict[int, Tensor]) -> tuple[Any, Tensor]:
        this = self.rounds[number]
        for piece in this.send:
            if piece.part not in asked:
                asked[piece.part] = source(piece.part).to(self.dtype)
        flat = self._flat([piece.of(asked[piece.part]) for piece in this.send])
        for part in this.last:
            del asked[part]
        return self._move(flat, this.receive_counts, this.send_counts)

    def _work(self, this: Round, flat: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
        """The received pieces, put together, worked on by shape, and cut up for those that hold them."""
        stacks = _Stacks(this.owned, flat.dtype, flat.device)
        views = [stacks.of(slot) for slot in this.receive]
        if views:
            torch._foreach_copy_(views, _cut(flat, views))
        stacks.work(work)
        return self._flat([stacks.of(slot) for slot in this.give])

    def _apply(
        self, handle: Any, flat: Tensor, this: Round, apply: Callable[[list[Piece], list[Tensor]], None]
    ) -> None:
        flat = _wait(handle, flat)
        if this.take:
            results = [
                piece.view(take.sizes)
                for take, piece in zip(this.take, flat.split([_count(piece) for piece in this.take]))
            ]
            apply(this.take, results)

    def _flat(self, tensors: list[Tensor]) -> Tensor:
        if not tensors:
            return torch.empty(0, dtype=self.dtype, device=self.device)
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    def _move(self, flat: Tensor, coming: list[int], going: list[int]) -> tuple[Any, Tensor]:
        if self.group is None:
            return None, flat
        out = flat.new_empty(sum(coming))
        return dist.all_to_all_single(out, flat, coming, going, group=self.group, async_op=True), out


class _Stacks:
    """The matrices that this rank works on in a round, those of one shape side by side; after `work` the results."""

    def __init__(self, owned: Sequence[Matrix], dtype: torch.dtype, device: torch.device):
        alike: dict[tuple[int, ...], list[int]] = {}
        for index, matrix in enumerate(owned):
            alike.setdefault(matrix.sizes, []).append(index)
        self.places = {index: (shape, place) for shape, each in alike.items() for place, index in enumerate(each)}
        self.stacks = {
            shape: torch.empty(len(each), *shape, dtype=dtype, device=device) for shape, each in alike.items()
        }

    def of(self, slot: Slot) -> Tensor:
        shape, place = self.places[slot.place]
        return _view(self.stacks[shape][place], slot.span)

    def work(self, work: Callable[[Tensor], Tensor]) -> None:
        for shape, whole in self.stacks.items():
            self.stacks[shape] = work(whole.view(-1, *shape[-2:])).view(whole.shape)


def _wait(handle: Any, flat: Tensor) -> Tensor:
    if handle is not None:
        handle.wait()
    return flat


def _piece(part: int, matrix: Matrix, span: Span, own: list[Box]) -> Piece:
    """The place of a span of the matrix in this rank's own tensor."""
    start = tuple(a + b for a, b in zip(matrix.offsets, span[0]))
    for box in own:
        inside = zip(start, span[1], box.whole, box.sizes)
        if all(low <= first and first + length <= low + size for first, length, low, size in inside):
            offsets = tuple(a - b + c for a, b, c in zip(start, box.whole, box.local))
            return Piece(part, offsets, span[1], matrix)
    raise AssertionError("a rank sends only what it holds")


def _count(entry: Piece | Slot) -> int:
    sizes = entry.sizes if isinstance(entry, Piece) else entry.span[1]
    count = 1
    for size in sizes:
        count *= size
    return count


def _view(tensor: Tensor, span: Span) -> Tensor:
    tensor = local(tensor)
    for dim, (offset, size) in enumerate(zip(*span)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


def _cut(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    pieces = flat.split([view.numel() for view in like])
    return [piece.view(view.shape) for piece, view in zip(pieces, like)]
