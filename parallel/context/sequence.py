"""The sequence context of one rank of a context-parallel group: the methods of the model's own, over a row cut in chunks.

It wraps the model's plain context of this rank's pieces, seen as packed sequences of their own, and adds what came before them.
Each method makes one exchange: keys and values for attention, a summary of each chunk for a recurrence, each chunk's last
columns for a convolution. All ranks take part in all of them, also those that need nothing from one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import attention, short_convolution
from kernels.common.opaque import opaque
from parallel import collectives
from parallel.context.cut import Cut, check_reach
from parallel.context.recurrences import law_of
from parallel.context.ring import ring_attention

Exchange = Literal["gather", "ring"]
Cache = dict[str, Any] | None


class Continued(NamedTuple):
    """A chunk that begins inside a document. piece: the number of its first piece among all of this rank."""

    piece: int
    chunk: int
    document: int


class Keys(NamedTuple):
    """For each of this rank's chunks the first key that it needs, and all keys' borders: int32 [pieces + 1]."""

    first: list[int]
    cu_seqlens: Tensor


class CutSequence:
    """The methods mean what they mean in pretrain/model/sequence.py, of this rank's tokens [1, T / ranks, ...].

    plain: the model's context for this rank's pieces; its positions are set to those in the whole documents.

    exchange: how attention reaches earlier keys. "gather": all ranks gather all keys and values, and the fused kernel attends.
    "ring": they travel from rank to rank, and no rank holds more than two ranks' share of them.
    """

    def __init__(self, plain: Any, cut: Cut, group: dist.ProcessGroup, exchange: Exchange):
        plain.positions = cut.positions()[None].to(plain.positions.device)
        self.plain, self.cut, self.group, self.exchange = plain, cut, group, exchange
        self.positions: Tensor = plain.positions
        self.cu_seqlens: Tensor = plain.cu_seqlens  # of the pieces: the documents' own borders lie in the cut
        self._keys: dict[int | None, Keys] = {}
        begins = (0, len(cut.pieces[0]))
        self._continued = [
            Continued(begin, chunk, pieces[0].document)
            for begin, chunk, pieces in zip(begins, cut.chunks, cut.pieces)
            if pieces[0].continues
        ]

    @opaque
    def rotary(self, dim: int, theta: float) -> tuple[Tensor, Tensor]:
        tables: tuple[Tensor, Tensor] = self.plain.rotary(dim, theta)
        return tables

    @opaque
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        cache: Cache = None,
    ) -> Tensor:
        _refuse(cache)
        cut, C = self.cut, self.cut.chunk
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        # A window that ends in the chunk before needs only that chunk's last columns.
        reach = C if window is None else min(C, window - 1)
        if reach == C and self.exchange == "ring":
            return ring_attention(q, k, v, scale, window, cut, self.group)
        kv = torch.cat((k, v), dim=-1)  # one exchange for both
        q, tails = self._tails(q, kv, reach)
        first, cu_seqlens_k = self._needed(window)
        seen: list[Tensor] = []
        for own, chunk, begin in zip(kv.split(C, dim=1), cut.chunks, first):
            for earlier in range(begin // C, chunk):
                tail_begin = (earlier + 1) * C - reach
                seen.append(tails[cut.place(earlier), max(0, begin - tail_begin) :][None])
            seen.append(own)
        k, v = torch.cat(seen, dim=1).split((k.shape[-1], v.shape[-1]), dim=-1)
        return attention(q, k, v, scale=scale, window=window, cu_seqlens=self.cu_seqlens, cu_seqlens_k=cu_seqlens_k)

    def extend(self, x: Tensor, cache: Cache, name: str) -> Tensor:
        _refuse(cache)
        return x

    def _needed(self, window: int | None) -> Keys:
        if window not in self._keys:
            first, lengths = [], []
            for chunk, pieces in zip(self.cut.chunks, self.cut.pieces):
                start = chunk * self.cut.chunk
                first.append(pieces[0].document if window is None else max(pieces[0].document, start - window + 1))
                earlier = [start - first[-1]] + [0] * (len(pieces) - 1)
                lengths += [piece.end - piece.start + more for piece, more in zip(pieces, earlier)]
            self._keys[window] = Keys(first, torch.tensor([0, *lengths]).cumsum(0).to(self.cu_seqlens))
        return self._keys[window]

    @opaque
    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = "silu", cache: Cache = None
    ) -> Tensor:
        _refuse(cache)
        x, before = self._columns(x, weight.shape[1] - 1)
        states = None if before is None else before.transpose(1, 2)
        y, _ = short_convolution(
            x, weight, bias, activation=activation, initial_state=states, cu_seqlens=self.cu_seqlens
        )
        return y

    @opaque
    def look_back(
        self,
        operator: Callable[..., tuple[Any, ...]],
        x: Tensor,
        *parameters: Tensor,
        reach: int,
        cache: Cache = None,
        name: str = "columns",
        **options: Any,
    ) -> tuple[Tensor, ...]:
        _refuse(cache)
        x, before = self._columns(x, reach)
        *outputs, _ = operator(x, *parameters, initial_state=before, cu_seqlens=self.cu_seqlens, **options)
        return tuple(outputs)

    @opaque
    def recur(
        self,
        operator: Callable[..., tuple[Tensor, Tensor | None]],
        *inputs: Tensor | None,
        cache: Cache = None,
        **options: Any,
    ) -> Tensor:
        _refuse(cache)
        head = inputs[0]
        assert head is not None
        law, cut, C = law_of(operator), self.cut, self.cut.chunk
        with torch.autocast(head.device.type, enabled=False):
            summaries = []
            for slot, pieces in enumerate(cut.pieces):
                # What is passed on is the state of the chunk's last document.
                begin = slot * C + pieces[-1].start - cut.chunks[slot] * C
                span = [x if x is None or x.dim() < 3 else x[:, begin : (slot + 1) * C] for x in inputs]
                summaries.append(law.summarize(span, options))
            shapes = [part.shape for part in summaries[0]]
            head, everyone = collectives.beside(
                head, torch.stack([_flat(summary) for summary in summaries]), self.group
            )
            states = []
            for _, chunk, document in self._continued:
                begun = document // C
                state = _unflat(everyone[cut.place(begun)], shapes)[0]
                for between in range(begun + 1, chunk):
                    state = law.advance(state, _unflat(everyone[cut.place(between)], shapes), inputs)
                states.append(state[0])
            initial = self._initial(states)
        o, _ = operator(head, *inputs[1:], initial_state=initial, cu_seqlens=self.cu_seqlens, **options)
        return o

    @opaque
    def history(
        self, x: Tensor, reach: int, before: Tensor | None = None, cache: Cache = None, name: str = "history"
    ) -> list[Tensor]:
        _refuse(cache)
        C = self.cut.chunk
        before = x.new_zeros(x.shape[2]) if before is None else before.to(x.dtype)
        x, tails = self._tails(x, x, reach)
        streams = []
        for own, chunk in zip(x.split(C, dim=1), self.cut.chunks):
            past = before.expand(reach, -1) if chunk == 0 else tails[self.cut.place(chunk - 1)]
            streams.append(torch.cat((past[None], own), dim=1))
        ago = range(reach, -1, -1)
        steps = [torch.cat([stream[:, reach - n : reach - n + C] for stream in streams], dim=1) for n in ago]
        positions = self.positions[..., None]
        return [torch.where(positions < n, before, step) if n else step for n, step in zip(ago, steps)]

    @opaque
    def following(self, row: Tensor, fill: int) -> Tensor:
        C, chunks = self.cut.chunk, row.chunk(2, dim=1)
        first = collectives.gathered(row[0, ::C], 0, self.group)
        shifted = []
        for own, chunk in zip(chunks, self.cut.chunks):
            place = self.cut.place(chunk + 1) if chunk + 1 < 2 * self.cut.ranks else 0  # behind the row: replaced below
            shifted += [own[:, 1:], first[place][None, None]]
        return torch.cat(shifted, dim=1).masked_fill(self.cut.last().to(row.device), fill)

    @opaque
    def owners(self) -> tuple[Tensor, int]:
        return self.cut.owners().to(self.positions.device), len(self.cut.borders) - 1

    @opaque
    def total(self, counts: Tensor) -> Tensor:
        return collectives.summed(counts, self.group)

    def _columns(self, x: Tensor, reach: int) -> tuple[Tensor, Tensor | None]:
        """(x, the `reach` columns before each piece [pieces, reach, C], zeros before a document; None where none continues)."""
        x, tails = self._tails(x, x, reach)
        states = []
        for _, chunk, document in self._continued:
            known = min(reach, chunk * self.cut.chunk - document)
            columns = tails[self.cut.place(chunk - 1), reach - known :]
            states.append(torch.cat((columns.new_zeros(reach - known, columns.shape[1]), columns)))
        return x, self._initial(states)

    def _tails(self, kept: Tensor, x: Tensor, reach: int) -> tuple[Tensor, Tensor]:
        """(kept, the last `reach` columns of every chunk of x [1, 2 * chunk, ...]: [2 * ranks, reach, ...], by place)."""
        C = self.cut.chunk
        check_reach(reach, self.cut.length, self.cut.ranks)
        if reach == 0 or x.shape[-1] == 0:
            return kept, x.new_empty(2 * self.cut.ranks, reach, *x.shape[2:])
        return collectives.beside(kept, x[0].unflatten(0, (2, C))[:, C - reach :], self.group)

    def _initial(self, states: list[Tensor]) -> Tensor | None:
        """States of the chunks that continue a document -> of all pieces [pieces, ...], zero where one begins."""
        if not states:
            return None
        rows = torch.stack(states)
        index = torch.tensor([continued.piece for continued in self._continued], device=rows.device)
        return rows.new_zeros(self.cu_seqlens.numel() - 1, *rows.shape[1:]).index_copy(0, index, rows)


def _flat(summary: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.flatten() for part in summary])


def _unflat(flat: Tensor, shapes: list[torch.Size]) -> tuple[Tensor, ...]:
    parts = flat.split([shape.numel() for shape in shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes))


def _refuse(cache: Cache) -> None:
    if cache is not None:
        raise ValueError("context parallelism is for training, where nothing is cached; generate with mesh.cp=1")
