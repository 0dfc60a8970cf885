"""The selective scan in plain torch, by chunks, with a hand-written backward.

All chunks of `chunk_size` tokens run side by side: one step of the loop moves every chunk one token on, from a zero state;
a second, short loop carries states from chunk to chunk; then what each chunk inherited is added to its tokens. So Python
takes C + T / C steps instead of T, and every exponent is a sum of numbers <= 0.

A channel never meets another inside the scan, so channels are worked through in blocks: the [T, channels, N] tensors of a
block are bounded by `BLOCK_BYTES` whatever the model's width, and nothing of that size is kept for the backward, which
runs each block's scan again from the saved states at the chunks' starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.common.exponential import exp_
from kernels.gated_linear_attention.plan import Plan, make_plan

CHUNK_SIZE = 64
BLOCK_BYTES = 8 << 20  # of one [T, channels, N] tensor; a handful of them are alive at a time


@dataclass(frozen=True)
class _Tokens:
    """A call's tensors with the place in the chunk first: x, dt [C, M, D] and B, C [C, M, N]; zero where there is no token."""

    plan: Plan
    slots: Tensor  # int64 [C M]; the last valid token + 1 where there is none
    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    A: Tensor
    width: int  # channels a block

    def channels(self) -> Iterator[slice]:
        D = self.A.shape[0]
        for first in range(0, D, self.width):
            yield slice(first, min(first + self.width, D))

    def take(self, t: Tensor) -> Tensor:
        """[b, T, X] -> [C, M, X]."""
        return _take(t, self.slots, self.plan, self.A.dtype)

    def give(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of take."""
        B, T, C = self.plan.B, self.plan.T, self.plan.C
        out = torch.empty(B * T + 1, t.shape[-1], dtype=dtype, device=t.device)
        out.index_copy_(0, self.slots, t.view(C * self.plan.chunks, -1).to(dtype))
        return out[: B * T].view(B, T, -1)

    def steps(self, reverse: bool = False) -> list[tuple[slice, slice]]:
        """(chunks, sorted sequences) of each step of the scan over chunks."""
        steps = [(slice(a, b), slice(0, b - a)) for a, b in self.plan.steps]
        return steps[::-1] if reverse else steps


def _take(t: Tensor, slots: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    L = plan.B * plan.T
    rows = t.reshape(L, -1).index_select(0, slots.clamp(max=L - 1)).to(dtype)
    if plan.order is not None or plan.T % plan.C:
        rows.masked_fill_((slots == L)[:, None], 0)
    return rows.view(plan.C, plan.chunks, -1)


def _tokens(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor | None, chunk_size: int
) -> _Tokens:
    plan = make_plan(x.shape[0], x.shape[1], chunk_size, cu_seqlens, x.device)
    slots = plan.slots.t().reshape(-1)
    wide = torch.promote_types(x.dtype, torch.float32)
    a_channel = slots.numel() * A.shape[1] * wide.itemsize
    shares = torch.get_num_threads() if x.device.type == "cpu" else 64
    x, dt, B, C = (_take(t, slots, plan, wide) for t in (x, dt, B, C))
    return _Tokens(plan, slots, x, dt, B, C, A.to(wide), max(1, BLOCK_BYTES * shares // a_channel))


def _decays(s: _Tokens, block: slice) -> tuple[Tensor, Tensor]:
    """exp(dt A) of each token [C, M, d, N], and of each chunk as a whole [M, d, N]."""
    dt, A = s.dt[..., block, None], s.A[block]
    return exp_(dt * A), exp_(dt.sum(0) * A)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., None] * b[..., None, :]


def _forward_block(s: _Tokens, block: slice, state: Tensor, starts: Tensor) -> Tensor:
    """States after each token [C, M, d, N]. `starts` [M, d, N] receives the chunks' first states, `state` the last ones."""
    decay, total = _decays(s, block)
    h = _outer(s.dt[..., block] * s.x[..., block], s.B)
    for i in range(1, len(h)):
        h[i].addcmul_(decay[i], h[i - 1])
    for chunks, sequences in s.steps():
        here = state[sequences]
        starts[chunks] = here
        here.mul_(total[chunks]).add_(h[-1, chunks])
    inherited = starts.clone()
    for i in range(len(h)):
        h[i] += inherited.mul_(decay[i])
    return h


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        s = _tokens(x, dt, A, B, C, cu_seqlens, chunk_size)
        plan, (channels, N) = s.plan, A.shape
        state = x.new_zeros(plan.sequences, channels, N, dtype=s.A.dtype)
        if initial_state is not None:
            state.copy_(plan.sort(initial_state))
        y = torch.empty_like(s.x)
        starts = state.new_empty(plan.chunks, channels, N)
        for block in s.channels():
            h = _forward_block(s, block, state[:, block], starts[:, block])
            y[..., block] = (h @ s.C[..., None]).squeeze(-1)
        if D is not None:
            y.addcmul_(s.x, D.to(s.A.dtype))
        ctx.save_for_backward(x, dt, A, B, C, D, initial_state, cu_seqlens, starts)
        ctx.chunk_size = chunk_size
        return s.give(y, x.dtype), plan.unsort(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, initial_state, cu_seqlens, starts = ctx.saved_tensors
        s = _tokens(x, dt, A, B, C, cu_seqlens, ctx.chunk_size)
        dys = s.take(dy)
        dstate = s.plan.sort(dfinal).to(s.A.dtype).clone()
        dx, ddt, dA = torch.empty_like(s.x), torch.empty_like(s.x), torch.empty_like(s.A)
        dB, dC = torch.zeros_like(s.B), torch.zeros_like(s.C)
        for block in s.channels():
            dx[..., block], ddt[..., block], dA[block], dB_here, dC_here = _backward_block(
                s, block, starts[:, block], dys[..., block], dstate[:, block]
            )
            dB += dB_here
            dC += dC_here
        dD = None
        if D is not None:
            dD = (s.x * dys).sum((0, 1)).to(D.dtype)
            dx.addcmul_(dys, D.to(s.A.dtype))
        return (
            s.give(dx, x.dtype),
            s.give(ddt, dt.dtype),
            dA.to(A.dtype),
            s.give(dB, B.dtype),
            s.give(dC, C.dtype),
            dD,
            None if initial_state is None else s.plan.unsort(dstate).to(initial_state.dtype),
            None,
            None,
        )


def _backward_block(
    s: _Tokens, block: slice, starts: Tensor, dy: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, ddt [C, M, d], dA [d, N], and this block's share of dB and dC [C, M, N].

    starts: the states at the chunks' starts; dstate [sequences, d, N] turns from the final into the initial states' gradient.
    """
    decay, total = _decays(s, block)
    x, dt, A = s.x[..., block], s.dt[..., block], s.A[block]
    u = dt * x
    h = _outer(u, s.B)
    last = starts
    for i in range(len(h)):
        last = h[i].addcmul_(decay[i], last)
    # dh: the gradient of each token's state; first what comes from inside its chunk, then what later chunks pass back.
    dh = _outer(dy, s.C)
    for i in range(len(h) - 2, -1, -1):
        dh[i].addcmul_(decay[i + 1], dh[i + 1])
    passed = torch.empty_like(starts)
    leaving = decay[0] * dh[0]
    for chunks, sequences in s.steps(reverse=True):
        here = dstate[sequences]
        passed[chunks] = here
        here.mul_(total[chunks]).add_(leaving[chunks])
    for i in range(len(h) - 1, -1, -1):
        dh[i] += passed
        passed *= decay[i]
    dC = (dy[..., None, :] @ h).squeeze(-2)
    dB = (u[..., None, :] @ dh).squeeze(-2)
    du = (dh @ s.B[..., None]).squeeze(-1)
    # Through the decay, whose exponent is dt A: its gradient is decay times the state before times dh.
    decay[1:] *= h[:-1]
    decay[0] *= starts
    exponent = decay.mul_(dh)
    ddt = (exponent * A).sum(-1).addcmul_(x, du)
    dA = (exponent * dt[..., None]).sum((0, 1))
    return du * dt, ddt, dA, dB, dC


def selective_scan_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.state_space.selective_scan`. chunk_size: tokens."""
    y, state = _SelectiveScan.apply(x, dt, A, B, C, D, initial_state, cu_seqlens, chunk_size)
    return y, state if output_final_state else None
