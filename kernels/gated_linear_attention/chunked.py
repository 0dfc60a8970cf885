"""Gated linear attention in plain torch, by chunks, with a hand-written backward.

Time is cut into chunks of `chunk_size` tokens; inside a chunk the work is matrix products, and only the state scan goes from
chunk to chunk. Saved for backward: the inputs and the state at the start of each chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.gated_linear_attention.channel_gate import ChannelGate
from kernels.gated_linear_attention.core import Gate, Gradients, backward, forward
from kernels.gated_linear_attention.head_gate import HeadGate, NoGate
from kernels.gated_linear_attention.operands import Operands
from kernels.gated_linear_attention.plan import make_plan

CHUNK_SIZE = 64
# Of one segment's largest tensors together: less keeps more of them in the L2 cache, but every call of an operator costs time.
SEGMENT_BYTES = 4 << 20


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of matmul operands: bf16 stays (its products sum in fp32); fp16 widens, because states overflow its range."""
    return torch.float32 if dtype == torch.float16 else dtype


def _operands(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, cu_seqlens: Tensor | None, chunk_size: int
) -> Operands:
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    wide = torch.promote_types(q.dtype, torch.float32)
    compute = compute_dtype(q.dtype)
    a_chunk = HV * (K * V + 2 * chunk_size * (K + V) + chunk_size**2) * compute.itemsize
    caches = torch.get_num_threads() if q.device.type == "cpu" else 64
    by_channel = g is not None and g.dim() == 4
    return Operands(
        plan=make_plan(B, T, chunk_size, cu_seqlens, q.device),
        q=q.reshape(-1, H, K),
        k=k.reshape(-1, H, K),
        v=v.reshape(-1, HV, V),
        g=None if g is None else g.to(wide).flatten(0, 1),
        H=HV if by_channel else H,
        R=1 if by_channel else HV // H,
        repeat=HV // H if by_channel else 1,
        scale=scale,
        compute=compute,
        wide=wide,
        size=max(1, SEGMENT_BYTES * caches // a_chunk),
    )


def _gate(x: Operands) -> Gate:
    if x.g is None:
        return NoGate(x)
    return ChannelGate(x) if x.g.dim() == 3 else HeadGate(x)


def _inner_states(x: Operands, states: Tensor | None) -> Tensor:
    """[N, H R, K, V] -> a new sorted [N, H, K, R V]."""
    N = x.plan.sequences
    if states is None:
        return x.q.new_zeros(N, x.H, x.K, x.R * x.V, dtype=x.wide)
    inner = states.to(x.wide).reshape(N, x.H, x.R, x.K, x.V).transpose(2, 3)
    return x.plan.sort(inner).clone(memory_format=torch.contiguous_format).flatten(3)


def _outer_states(x: Operands, states: Tensor) -> Tensor:
    """The inverse of `_inner_states`."""
    states = states.unflatten(3, (x.R, x.V)).transpose(2, 3)
    return x.plan.unsort(states.reshape(x.plan.sequences, x.H * x.R, x.K, x.V))


class _GatedLinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        x = _operands(q, k, v, g, scale, cu_seqlens, chunk_size)
        state = _inner_states(x, initial_state)
        B, T, HV, V = v.shape
        K = q.shape[-1]
        o = v.new_empty(B * T + 1, HV, V)
        starts = None
        if any(ctx.needs_input_grad):
            starts = torch.empty(x.plan.chunks * x.H, K, x.R * V, dtype=x.compute, device=q.device)
        forward(x, _gate(x), state, o, starts)
        o = o[: B * T].view(B, T, HV, V)
        ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens, starts)
        ctx.scale, ctx.chunk_size = scale, chunk_size
        return o, _outer_states(x, state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, initial_state, cu_seqlens, starts = ctx.saved_tensors
        x = _operands(q, k, v, g, ctx.scale, cu_seqlens, ctx.chunk_size)
        dstate = _inner_states(x, dfinal)
        B, T, HV, V = v.shape
        H, K = q.shape[2:]
        L = B * T
        gradients = Gradients(
            q=q.new_empty(L + 1, x.H, K),
            k=k.new_empty(L + 1, x.H, K),
            v=v.new_empty(L + 1, HV, V),
            g=None if g is None else g.new_empty(L + 1, *g.shape[2:]),
        )
        backward(x, _gate(x), do.reshape(L, HV, V), starts, dstate, gradients)

        def shaped(gradient: Tensor) -> Tensor:
            return gradient[:L].view(B, T, H, x.repeat, K).sum(3) if x.repeat > 1 else gradient[:L].view(q.shape)

        return (
            shaped(gradients.q),
            shaped(gradients.k),
            gradients.v[:L].view(v.shape),
            None if gradients.g is None or g is None else gradients.g[:L].view(g.shape),
            None if initial_state is None else _outer_states(x, dstate).to(initial_state.dtype),
            None,
            None,
            None,
        )


def gated_linear_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.gated_linear_attention.gated_linear_attention`. chunk_size: tokens, a power of two."""
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two, got {chunk_size}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, final_state = _GatedLinearAttention.apply(q, k, v, g, initial_state, cu_seqlens, scale, chunk_size)
    return o, final_state if output_final_state else None
