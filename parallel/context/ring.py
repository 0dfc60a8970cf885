"""Attention over a cut row with keys and values that travel from rank to rank (Liu et al. 2023, arXiv:2310.01889).

Each rank attends to its own keys and values, passes them on, attends to those that came, and so on until all have been by. What a
query has gathered so far is its output and the logarithm of its sum of exponentials, into which each block is merged; the pass of
the next block overlaps with the work on this one. In the backward pass keys and values go round once more, with their gradients.

Plain torch by tiles, in fp32 at least: it saves memory, in which a rank never holds more than two ranks' keys and values, and not
time. Gathering serves the fused kernels.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.context.cut import Cut

SCORES = 1 << 24  # of one tile, all heads together: 64 MB in fp32


class Tile(NamedTuple):
    """queries, keys: which of this rank's tokens, and of those that came by. first_*: the first one's place in the row.

    masked: whether some of the queries do not see some of the keys.
    """

    queries: slice
    keys: slice
    first_query: int
    first_key: int
    masked: bool


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, cut: Cut, group: dist.ProcessGroup
) -> Tensor:
    """Causal attention within documents -> [1, T, H, V], T this rank's tokens.

    q [1, T, H, K], k [1, T, HKV, K], v [1, T, HKV, V].
    """
    o: Tensor = _RingAttention.apply(q, k, v, scale, window, cut, group)
    return o


def tiles(cut: Cut, source: int, window: int | None, rows: int) -> Iterator[Tile]:
    """What this rank's queries, `rows` at a time, see of the tokens of rank `source`. Of a query, its own tile comes first."""

    def lowest(token: int) -> int:
        document = cut.borders[bisect_right(cut.borders, token) - 1]
        return document if window is None else max(document, token - window + 1)

    C = cut.chunk
    others = (source, 2 * cut.ranks - 1 - source)
    for slot, chunk in enumerate(cut.chunks):
        visible = [(place, other) for place, other in enumerate(others) if other <= chunk]
        for begin in range(chunk * C, (chunk + 1) * C, rows):
            end = min(begin + rows, (chunk + 1) * C)
            for place, other in sorted(visible, key=lambda pair: pair[1] != chunk):
                first, last = max(other * C, lowest(begin)), min((other + 1) * C, end)
                if first < last:
                    # The last query has the highest lower bound, the first one the lowest upper bound.
                    masked = lowest(end - 1) > first or last - 1 > begin
                    shift, key_shift = (slot - chunk) * C, (place - other) * C
                    queries, keys = slice(begin + shift, end + shift), slice(first + key_shift, last + key_shift)
                    yield Tile(queries, keys, begin, first, masked)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        cut: Cut,
        group: dist.ProcessGroup,
    ) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            sight = _Sight(q, k, window, cut)
            queries = sight.heads(q) * scale
            o = queries.new_zeros(*queries.shape[:3], v.shape[-1])
            log_sum = queries.new_full(queries.shape[:3], -torch.inf)
            block = torch.cat((k[0], v[0]), dim=-1)
            for step in range(cut.ranks):
                onward = _Passing(block, group) if step + 1 < cut.ranks else None
                for tile in sight.tiles(step):
                    keys, values = sight.keys(block[tile.keys], k.shape[-1])
                    scores = sight.scores(tile, queries, keys)
                    sums = scores.logsumexp(-1)
                    weights = (scores - sums.masked_fill(sums == -torch.inf, 0.0)[..., None]).exp()
                    _merge(o[:, :, tile.queries], log_sum[:, :, tile.queries], weights @ values, sums)
                if onward is not None:
                    block = onward.received()
        ctx.save_for_backward(q, k, v, o, log_sum)
        ctx.settings = (scale, window, cut, group)
        return sight.row(o).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, log_sum = ctx.saved_tensors
        scale, window, cut, group = ctx.settings
        with torch.autocast(q.device.type, enabled=False):
            sight = _Sight(q, k, window, cut)
            queries, do = sight.heads(q) * scale, sight.heads(grad)
            delta = (do * o).sum(-1, keepdim=True)
            dq = torch.zeros_like(queries)
            block = torch.cat((k[0], v[0]), dim=-1)
            dblock = torch.zeros(block.shape, dtype=o.dtype, device=o.device)
            for step in range(cut.ranks):
                onward = _Passing(block, group) if step + 1 < cut.ranks else None
                for tile in sight.tiles(step):
                    keys, values = sight.keys(block[tile.keys], k.shape[-1])
                    rows = tile.queries
                    weights = (sight.scores(tile, queries, keys) - log_sum[:, :, rows, None]).exp()
                    dscores = weights * (do[:, :, rows] @ values.mT - delta[:, :, rows])
                    dq[:, :, rows] += dscores @ keys
                    dkeys = (dscores.mT @ queries[:, :, rows]).sum(1)
                    dvalues = (weights.mT @ do[:, :, rows]).sum(1)
                    dblock[tile.keys] += torch.cat((dkeys, dvalues), dim=-1).transpose(0, 1)
                if onward is not None:
                    block = onward.received()
                dblock = _Passing(dblock, group).received()  # after the last step they are home again
        dk, dv = dblock[None].split((k.shape[-1], v.shape[-1]), dim=-1)
        return sight.row(dq * scale).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


class _Sight:
    """Who sees whom, and the layout of the work: [HKV, H // HKV, tokens, channels]."""

    def __init__(self, q: Tensor, k: Tensor, window: int | None, cut: Cut) -> None:
        self.cut, self.window = cut, window
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.kv_heads = k.shape[2]
        self.rows = max(1, SCORES // (q.shape[2] * cut.chunk))
        lowest = cut.tokens() - cut.positions()
        if window is not None:
            lowest = torch.maximum(lowest, cut.tokens() - window + 1)
        self.lowest = lowest.to(q.device)

    def tiles(self, step: int) -> Iterator[Tile]:
        """The tiles of this rank with the block that is here at a step: the own one first, then the rank's before, ..."""
        return tiles(self.cut, (self.cut.rank - step) % self.cut.ranks, self.window, self.rows)

    def heads(self, x: Tensor) -> Tensor:
        """[1, T, H, K] -> [HKV, H // HKV, T, K]."""
        return x[0].to(self.wide).unflatten(1, (self.kv_heads, -1)).permute(1, 2, 0, 3)

    def row(self, x: Tensor) -> Tensor:
        """The inverse."""
        return x.permute(2, 0, 1, 3).flatten(1, 2)[None]

    def keys(self, block: Tensor, key_dim: int) -> tuple[Tensor, Tensor]:
        """[S, HKV, K + V] -> [HKV, 1, S, K] and [HKV, 1, S, V]."""
        k, v = block.to(self.wide).transpose(0, 1)[:, None].split((key_dim, block.shape[-1] - key_dim), dim=-1)
        return k, v

    def scores(self, tile: Tile, queries: Tensor, keys: Tensor) -> Tensor:
        """[HKV, H // HKV, queries, keys], -inf where a query does not see a key."""
        scores = queries[:, :, tile.queries] @ keys.mT
        if not tile.masked:
            return scores
        query = torch.arange(scores.shape[2], device=scores.device) + tile.first_query
        key = torch.arange(scores.shape[3], device=scores.device) + tile.first_key
        hidden = (key > query[:, None]) | (key < self.lowest[tile.queries, None])
        return scores.masked_fill_(hidden, -torch.inf)


def _merge(o: Tensor, log_sum: Tensor, o_new: Tensor, log_sum_new: Tensor) -> None:
    """Adds what a block gave, o_new with its log sum, to what was gathered so far, in place. One of the log sums is finite."""
    both = torch.logaddexp(log_sum, log_sum_new)
    o.mul_((log_sum - both).exp()[..., None]).add_(o_new * (log_sum_new - both).exp()[..., None])
    log_sum.copy_(both)


class _Passing:
    """A tensor on its way to the next rank of the group, while that of the rank before is on its way here."""

    def __init__(self, x: Tensor, group: dist.ProcessGroup) -> None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        following, previous = (dist.get_global_rank(group, (rank + by) % ranks) for by in (1, -1))
        self.sent, self.arriving = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        self.works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self.sent, following, group),
                dist.P2POp(dist.irecv, self.arriving, previous, group),
            ]
        )

    def received(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.arriving
