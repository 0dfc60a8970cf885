"""CCA's queries and keys in plain torch, by blocks of tokens, with a hand-written backward.

Only z and the parameters are kept: the backward makes both convolutions again, block by block. Autograd would keep the windows,
which are as many times as large as z as the second convolution has taps, and a norm's and a mean's inputs besides.

All rows are one stream, in which R columns (`initial_state` or zeros) precede each sequence. A block takes the R rows before its
first token along; convolving it yields an output for each of its other rows, and those of rows that stand before a sequence are
left out. So packed, dense and continued batches are one code path, without a loop over sequences. Within a block heads come
first, and the taps of the second convolution are one product of W1 d channels a head.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.packing import sequence_bounds

BLOCK_BYTES = 1 << 19  # of z in fp32, a thread: the ten temporaries of this size do not all live at once


class _Block(NamedTuple):
    """tokens: of the stream. rows: those of the stream that the block sees, R more than it convolves; or where they are.

    kept: which of the convolved rows are tokens, None: all. begins: whether the first token is the first of its sequence.
    """

    tokens: slice
    rows: slice | Tensor
    kept: Tensor | None
    begins: bool


class _Stream:
    """z [B, T, C] as rows [L, C], and behind them, by number, the rows of the states [N R, C]."""

    def __init__(self, z: Tensor, state: Tensor | None, reach: int, cu_seqlens: Tensor | None) -> None:
        B, T, C = z.shape
        self.z, self.reach, self.L = z.reshape(B * T, C), reach, B * T
        self.state = None if state is None or reach == 0 else state.flatten(0, 1)
        bounds = sequence_bounds(cu_seqlens, B, T)
        self.starts = [row * T + start for row, start, _ in bounds]
        self.numbers = [
            n for n, (_, start, end) in enumerate(bounds) if end > start
        ]  # of the sequences that have tokens
        self.starts = [self.starts[n] for n in self.numbers]

    def blocks(self, size: int) -> Iterator[_Block]:
        """Blocks of `size` tokens, from the last one: what a block gives to rows before it is added when their turn comes."""
        for a in reversed(range(0, self.L, size)):
            yield self._block(a, min(a + size, self.L))

    def _block(self, a: int, b: int) -> _Block:
        R, device = self.reach, self.z.device
        first, last = bisect_right(self.starts, a) - 1, bisect_left(self.starts, b)
        begin = self.starts[first]
        if last == first + 1 and a - begin >= R:
            return _Block(slice(a, b), slice(a - R, b), None, False)
        pieces, kept, length = [], [], 0
        for number in range(first, last):
            start = self.starts[number]
            end = self.starts[number + 1] if number + 1 < last else b
            states = self.L + (self.numbers[number] + 1) * R
            here = max(a, start)
            before = here - start  # tokens of the sequence that come before the block
            pieces += [torch.arange(states - R + before, states)] if before < R else []
            pieces += [torch.arange(max(start, here - R), end)]
            kept.append(torch.arange(length, length + end - here))
            length += end - here + R
        rows, keep = torch.cat(pieces).to(device), torch.cat(kept).to(device)
        return _Block(slice(a, b), rows, None if last == first + 1 else keep, a == begin)

    def rows(self, block: _Block) -> Tensor:
        """[m + R, C], in z's dtype."""
        if isinstance(block.rows, slice):
            return self.z[block.rows]
        past = (block.rows >= self.L)[:, None]
        rows = self.z.index_select(0, block.rows.clamp(max=self.L - 1))
        if self.state is None:
            return rows.masked_fill_(past, 0.0)
        before = self.state.index_select(0, (block.rows - self.L).clamp(min=0))
        return torch.where(past, before.to(rows.dtype), rows)


class _Parameters(NamedTuple):
    """In fp32 at least, by head: depthwise [W0, J, 1, d], biases [J, 1, d], factor [HKV, 1, 1].

    grouped [J, W1 d, d] is in z's dtype.
    """

    depthwise: Tensor
    depthwise_bias: Tensor
    grouped: Tensor
    grouped_bias: Tensor
    factor: Tensor

    @classmethod
    def of(
        cls, z: Tensor, depthwise: Tensor, bias: Tensor, grouped: Tensor, last: Tensor, factor: Tensor
    ) -> _Parameters:
        J, _, d = grouped.shape
        wide = torch.promote_types(z.dtype, torch.float32)
        taps = depthwise.to(wide).t().reshape(-1, J, 1, d)
        return cls(
            taps,
            bias.to(wide).view(J, 1, d),
            grouped.to(z.dtype),
            last.to(wide).view(J, 1, d),
            factor.to(wide)[:, None, None],
        )


class _Work(NamedTuple):
    """A block by head: rows [J, m + R, d] and convolved x [J, n, d] before the norm, wide; window [J, m, W1 d] in z's dtype.

    scale [J, n, 1]: one over the length of x.
    """

    rows: Tensor
    window: Tensor
    x: Tensor
    scale: Tensor


class _Room:
    """Temporaries by name, whose memory the next block takes over: fresh memory costs more than the arithmetic, its pages are
    mapped one by one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.held = device, dict[str, Tensor]()

    def __call__(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        if name not in self.held or self.held[name].numel() < size:
            self.held[name] = torch.empty(size, dtype=dtype, device=self.device)
        return self.held[name][:size].view(shape)


def _work(stream: _Stream, block: _Block, p: _Parameters, eps: float, room: _Room) -> _Work:
    W0, J, _, d = p.depthwise.shape
    W1, HKV = p.grouped.shape[1] // d, p.factor.shape[0]
    H, R = J - HKV, W0 + W1 - 2
    wide, narrow = p.depthwise.dtype, p.grouped.dtype
    rows = stream.rows(block).unflatten(-1, (J, d)).transpose(0, 1)
    if rows.dtype != wide:
        rows = room("rows", *rows.shape, dtype=wide).copy_(rows)
    m = rows.shape[1] - R
    u = torch.addcmul(
        p.depthwise_bias, rows[:, : m + W1 - 1], p.depthwise[0], out=room("u", J, m + W1 - 1, d, dtype=wide)
    )
    for i in range(1, W0):
        u.addcmul_(rows[:, i : i + m + W1 - 1], p.depthwise[i])
    window = room("window", J, m, W1 * d, dtype=narrow)
    for i in range(W1):
        window[..., i * d : (i + 1) * d] = u[:, i : i + m]
    x = room("u", J, m, d, dtype=wide)  # u is done with
    if narrow == wide:
        torch.baddbmm(p.grouped_bias, window, p.grouped, out=x)
    else:
        torch.add(torch.bmm(window, p.grouped, out=room("product", J, m, d, dtype=narrow)), p.grouped_bias, out=x)
    now = rows[:, R:]
    if block.kept is not None:
        x, now = x.index_select(1, block.kept), now.index_select(1, block.kept)
    queries, keys = now[:H].unflatten(0, (HKV, -1)), now[H:]
    x[:H].unflatten(0, (HKV, -1)).add_(queries, alpha=0.5).add_(keys[:, None], alpha=0.5)
    x[H:].add_(keys, alpha=0.5).add_(queries.mean(dim=1), alpha=0.5)
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(eps).rsqrt_()
    return _Work(rows, window, x, scale)


def _size(stream: _Stream, wide: torch.dtype) -> int:
    """Tokens of a block."""
    if stream.z.device.type != "cpu":
        return max(stream.L, 1)
    return max(1, BLOCK_BYTES * torch.get_num_threads() // (stream.z.shape[1] * wide.itemsize))


class _CCA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        depthwise: Tensor,
        depthwise_bias: Tensor,
        grouped: Tensor,
        grouped_bias: Tensor,
        factor: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        B, T, _ = z.shape
        J, _, d = grouped.shape
        H = J - factor.numel()
        p = _Parameters.of(z, depthwise, depthwise_bias, grouped, grouped_bias, factor)
        stream = _Stream(z, state, depthwise.shape[1] + grouped.shape[1] // d - 2, cu_seqlens)
        q = torch.empty(B, T, H, d, dtype=z.dtype, device=z.device)
        k = torch.empty(B, T, J - H, d, dtype=z.dtype, device=z.device)
        queries, keys = q.view(-1, H, d).transpose(0, 1), k.view(-1, J - H, d).transpose(0, 1)
        room = _Room(z.device)
        for block in stream.blocks(_size(stream, p.factor.dtype)):
            work = _work(stream, block, p, eps, room)
            _product(work.x[:H], work.scale[:H], queries[:, block.tokens])
            _product(work.x[H:], work.scale[H:] * p.factor, keys[:, block.tokens])
        ctx.save_for_backward(z, depthwise, depthwise_bias, grouped, grouped_bias, factor, state, cu_seqlens)
        ctx.eps = eps
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        z, *parameters, state, cu_seqlens = ctx.saved_tensors
        depthwise, depthwise_bias, grouped, grouped_bias, factor = parameters
        J, _, d = grouped.shape
        H = J - factor.numel()
        p = _Parameters.of(z, *parameters)
        stream = _Stream(z, state, depthwise.shape[1] + grouped.shape[1] // d - 2, cu_seqlens)
        R, wide = stream.reach, p.factor.dtype
        dqs, dks = dq.reshape(-1, H, d).transpose(0, 1), dk.reshape(-1, J - H, d).transpose(0, 1)
        dz = torch.empty(stream.L, J * d, dtype=z.dtype, device=z.device)
        dstate = None if state is None else torch.zeros(state.shape, dtype=wide, device=z.device)
        sums = _Parameters(*(torch.zeros(each.shape, dtype=wide, device=z.device) for each in p))
        carried: Tensor | None = None
        room = _Room(z.device)
        for block in stream.blocks(_size(stream, wide)):
            work = _work(stream, block, p, ctx.eps, room)
            dy = room("dy", *work.x.shape, dtype=wide)
            dy[:H], dy[H:] = dqs[:, block.tokens], dks[:, block.tokens]
            drows = _gradients(work, block, dy, p, sums, room)
            if carried is not None and R:
                drows[:, -R:] += carried
            tokens = drows[:, R:] if block.kept is None else drows[:, R:].index_select(1, block.kept)
            dz[block.tokens].unflatten(-1, (J, d)).copy_(tokens.transpose(0, 1))
            carried = None if block.begins else drows[:, :R].clone()
            if dstate is not None and R and not isinstance(block.rows, slice):
                _to_states(drows, block, stream, dstate)
        dstate = None if dstate is None or state is None else dstate.to(state.dtype)
        return (
            dz.view(z.shape),
            sums.depthwise.reshape(-1, J * d).t().to(depthwise.dtype),
            sums.depthwise_bias.reshape(-1).to(depthwise_bias.dtype),
            sums.grouped.to(grouped.dtype),
            sums.grouped_bias.reshape(-1).to(grouped_bias.dtype),
            sums.factor.reshape(-1).to(factor.dtype),
            dstate,
            None,
            None,
        )


def _product(x: Tensor, scale: Tensor, out: Tensor) -> None:
    if x.dtype == out.dtype:
        torch.mul(x, scale, out=out)
    else:
        out.copy_(x.mul_(scale))


def _gradients(work: _Work, block: _Block, dy: Tensor, p: _Parameters, sums: _Parameters, room: _Room) -> Tensor:
    """The gradient of the block's rows [J, m + R, d], of dy [J, n, d]; adds those of the parameters to `sums`."""
    rows, window, unit, scale = work
    W0, J, _, d = p.depthwise.shape
    HKV, m = p.factor.shape[0], window.shape[1]
    H, R, W1 = J - HKV, rows.shape[1] - m, window.shape[2] // d
    wide, narrow = p.factor.dtype, window.dtype
    unit.mul_(scale)
    along = torch.mul(dy, unit, out=room("dwindow", *dy.shape, dtype=wide)).sum(-1, keepdim=True)
    sums.factor.add_(along[H:].sum(1, keepdim=True))
    dy[H:] *= p.factor
    along[H:] *= p.factor
    ds = dy.addcmul_(unit, along, value=-1.0).mul_(scale)
    sums.grouped_bias.add_(ds.sum(1, keepdim=True))
    # Every convolved row has a gradient, zero where it stands before a sequence.
    if block.kept is not None:
        ds = torch.zeros_like(rows[:, R:], memory_format=torch.contiguous_format).index_copy_(1, block.kept, ds)
    drows = room("drows", *rows.shape, dtype=wide)
    drows[:, :R] = 0.0
    queries, keys = ds[:H].unflatten(0, (HKV, -1)), ds[H:]
    share = keys * (0.5 / queries.shape[1])  # of the group's mean
    torch.add(share[:, None], queries, alpha=0.5, out=drows[:H, R:].unflatten(0, (HKV, -1)))
    torch.add(keys, queries.sum(1), out=drows[H:, R:]).mul_(0.5)
    if narrow == wide:
        sums.grouped.baddbmm_(window.transpose(1, 2), ds)
        dwindow = torch.bmm(ds, p.grouped.transpose(1, 2), out=room("dwindow", J, m, W1 * d, dtype=wide))
    else:
        low = room("product", J, m, d, dtype=narrow).copy_(ds)
        sums.grouped.add_(torch.bmm(window.transpose(1, 2), low))
        dwindow = torch.bmm(low, p.grouped.transpose(1, 2), out=window)
    du = room("du", J, m + W1 - 1, d, dtype=wide)
    du[:, :m] = dwindow[..., :d]
    du[:, m:] = 0.0
    for i in range(1, W1):
        du[:, i : i + m] += dwindow[..., i * d : (i + 1) * d]
    sums.depthwise_bias.add_(du.sum(1, keepdim=True))
    products = room("u", *du.shape, dtype=wide)  # where x was, which is done with
    for i in range(W0):
        seen = slice(i, i + m + W1 - 1)
        sums.depthwise[i].add_(torch.mul(du, rows[:, seen], out=products).sum(1, keepdim=True))
        drows[:, seen].addcmul_(du, p.depthwise[i])
    return drows


def _to_states(drows: Tensor, block: _Block, stream: _Stream, dstate: Tensor) -> None:
    """Adds the gradient of rows that stand before sequences; those handed on to the block before come from there."""
    assert isinstance(block.rows, Tensor)
    own = block.rows if block.begins else block.rows[stream.reach :]
    drows = drows if block.begins else drows[:, stream.reach :]
    (where,) = torch.nonzero(own >= stream.L, as_tuple=True)
    dstate.flatten(0, 1).index_add_(0, own[where] - stream.L, drows[:, where].transpose(0, 1).flatten(1))


def cca_chunked(
    z: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    grouped: Tensor,
    grouped_bias: Tensor,
    factor: Tensor,
    *,
    eps: float = 1e-12,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.cca.cca`."""
    q, k = _CCA.apply(z, depthwise, depthwise_bias, grouped, grouped_bias, factor, initial_state, cu_seqlens, eps)
    return q, k
