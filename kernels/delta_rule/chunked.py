"""The delta rule by chunks of C tokens, in plain torch: the production path on CPU.

With w = beta k (what is written), Xe = [q; k] decayed from the chunk's start, and E the decay from column j to row i:

    A = tril(q wᵀ ⊙ E)      P = stril(k wᵀ ⊙ E)         what tokens of the chunk read from each other's writes
    e = (I + P)^-1 (v − Xe_k S)                         what each token finds wrong: v minus what S̃ answers to its key
    o = Xe_q S + A e
    S' = decay(chunk) S + (w decayed to the chunk's end)ᵀ e

This is the WY form of Yang et al. 2024 (arXiv:2406.06484, 2412.06464; per channel in arXiv:2510.26692), written in the
errors e rather than in the corrected values beta e. Then beta lives in w alone and no gradient divides by it. Only the
reads and the write of S are sequential over chunks.

The gradient, with T = (I + P)^-1, dS the gradient of the state at the END of a chunk, and [a; b] rows stacked:

    de = Aᵀ do + write dS          Y = Tᵀ de          dv = Y
    dA = tril(do eᵀ)               dP = −stril(Y eᵀ)       since d(T r) through T is −(Tᵀ de)(T r)ᵀ
    dXe = [do; −Y] Sᵀ              dwrite = e dSᵀ
    dS' = decay(chunk) dS + Xeᵀ [do; −Y]                   the gradient at the chunk's start

So the keys act as further queries, whose output gradient is −Y. The gradient of a step's log decay sums what passes
over that step: rows at or after it, columns before it, and the state itself.

The chunks are worked on in slabs, runs of steps of the scan, so that temporaries stay small whatever T. Kept for the
backward pass: e, the inverses, and the states at the starts of chunks; or, where every channel decays by itself, those at the
starts of slabs and the scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.delta_rule.chunked_channel import forward_channels
from kernels.delta_rule.chunked_channel_backward import backward_channels
from kernels.delta_rule.chunked_head import forward_heads
from kernels.delta_rule.chunked_head_backward import backward_heads
from kernels.delta_rule.layout import ChunkLayout, chunk_layout

# Chunks times heads worked on at once, a thread, on CPU. An accelerator wants all the work at once.
SLAB = 16
# Where every channel decays by itself, slabs start from a stored state: fewer steps would store more states than operands.
CHANNEL_STEPS = 4


def delta_rule_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    normalize_qk: bool,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`kernels.delta_rule.delta_rule` by chunks; arguments already validated.

    chunk_size: 16, 32 or 64; by default 64, or less where the sequences are shorter.
    """
    if chunk_size is None:
        chunk_size = next((C for C in (16, 32) if q.shape[1] <= C), 64)
    if chunk_size not in (16, 32, 64):
        raise ValueError(f"chunk_size must be 16, 32 or 64, got {chunk_size}")
    channels = g is not None and g.dim() == 4
    most = SLAB * torch.get_num_threads() if q.device.type == "cpu" else None
    heads = v.shape[2] if channels else q.shape[2]
    layout = chunk_layout(q, cu_seqlens, heads, chunk_size, most, CHANNEL_STEPS if channels else 1, channels)
    o, state = _DeltaRule.apply(q, k, v, beta, g, initial_state, scale, normalize_qk, layout)
    return o, state if output_final_state else None


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        initial_state: Tensor | None,
        scale: float,
        normalize_qk: bool,
        layout: ChunkLayout,
    ) -> tuple[Tensor, Tensor]:
        recording = any(ctx.needs_input_grad)
        inputs = (_by_token(q), _by_token(k), _by_token(v), _by_token(beta))
        gate = None if g is None else _by_token(g)
        with torch.autocast(q.device.type, enabled=False):
            if gate is not None and gate.dim() == 3:
                o, state, kept = forward_channels(*inputs, gate, initial_state, scale, normalize_qk, layout, recording)
            else:
                o, state, kept = forward_heads(*inputs, gate, initial_state, scale, normalize_qk, layout, recording)
        if recording:
            ctx.save_for_backward(q, k, beta, g, *kept)
        ctx.scale, ctx.normalize_qk, ctx.layout = scale, normalize_qk, layout
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        return o.view(v.shape), state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        q, k, beta, g, *kept = ctx.saved_tensors
        inputs = (_by_token(q), _by_token(k), _by_token(beta))
        gate = None if g is None else _by_token(g)
        scale, normalize_qk, layout = ctx.scale, ctx.normalize_qk, ctx.layout
        dg: Tensor | None
        with torch.autocast(do.device.type, enabled=False):
            if gate is not None and gate.dim() == 3:
                dq, dk, dv, dbeta, dg, dinitial = backward_channels(
                    *inputs, gate, tuple(kept), _by_token(do), dstate, scale, normalize_qk, layout
                )
            else:
                dq, dk, dv, dbeta, dg, dinitial = backward_heads(
                    *inputs, gate, tuple(kept), _by_token(do), dstate, scale, normalize_qk, layout
                )
        whole = (dq.view(q.shape), dk.view(k.shape), dv.view(do.shape), dbeta.view(beta.shape))
        dg = None if dg is None else dg.view(g.shape)
        return *whole, dg, None if ctx.state_dtype is None else dinitial.to(ctx.state_dtype), None, None, None


def _by_token(x: Tensor) -> Tensor:
    """[B, T, ...] -> [tokens, ...]."""
    return x.flatten(0, 1)
