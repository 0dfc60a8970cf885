"""Gated linear attention: fused Triton form, forward and backward.

Stages: cumulative gates -> (channel gate: decayed operands and scores) -> serial scan over chunk states -> outputs, all
chunks at once. Backward: serial reverse scan -> gradients, all chunks at once.

Saved for the backward besides the inputs: the states at the chunk starts in the operands' dtype (2 K V / BT bytes a token and
head in bf16, a tenth of what a layer keeps anyway), because recomputing them is a serial scan; and for a channel gate the
scores (2 BT bytes), because their exponentials are the dearest part of the forward. G replaces g, at no cost when g is fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kernels.common.chunks import Chunks, dense_chunks, packed_chunks
from kernels.gated_linear_attention.triton_launch import Launcher
from kernels.packing import check_cu_seqlens

CHUNK = 64


def gated_linear_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = e^(g_t) S_(t-1) + k_t v_t^T, o_t = S_t^T (scale q_t), and the state after the last token.

    q, k [B, T, H, K]; v [B, T, HV, V], HV a multiple of H (value head i reads query head i // (HV / H)); g None,
    [B, T, HV] or [B, T, HV, K]: natural log of the decay, <= 0, taken as -100 below that. scale: K^(-1/2) if None.
    initial_state [N, HV, K, V]; cu_seqlens int32 [N + 1] when B = 1 holds N packed sequences.
    Returns o [B, T, HV, V] in v's dtype, and the state fp32 [N, HV, K, V] or None.
    Raises ValueError for shapes outside of these.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    if k.shape != q.shape or v.shape[:2] != q.shape[:2] or HV % H:
        raise ValueError(
            f"q, k must be [B, T, H, K] and v [B, T, HV, V] with HV a multiple of H, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if g is not None and g.shape not in ((B, T, HV), (B, T, HV, K)):
        raise ValueError(f"g must be None, [B, T, HV] or [B, T, HV, K] = {(B, T, HV, K)}, got {tuple(g.shape)}")
    N = B if cu_seqlens is None else check_cu_seqlens(cu_seqlens, B, T, q.device)
    if initial_state is not None and initial_state.shape != (N, HV, K, V):
        raise ValueError(f"initial_state must be [N, HV, K, V] = {(N, HV, K, V)}, got {tuple(initial_state.shape)}")
    k, v = k.to(q.dtype), v.to(q.dtype)
    scale = K**-0.5 if scale is None else float(scale)
    return _GatedLinearAttention.apply(q, k, v, g, initial_state, scale, output_final_state, cu_seqlens)


def _chunks(q: Tensor, cu_seqlens: Tensor | None) -> Chunks:
    B, T = q.shape[:2]
    # Short sequences get a shorter chunk: less padding to compute on.
    size = min(CHUNK, max(16, triton.next_power_of_2(T)))
    return dense_chunks(B, T, size) if cu_seqlens is None else packed_chunks(cu_seqlens, T, size)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


class _GatedLinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        initial_state: Tensor | None,
        scale: float,
        output_final_state: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        start = None if initial_state is None else initial_state.float().contiguous()
        launch = Launcher(q, k, v, g, scale, _chunks(q, cu_seqlens))
        G = launch.cumulative_gate(_contiguous(g))
        prepared = launch.prepare(G, scores=True)
        states, final = launch.states(G, prepared, start, output_final_state)
        o = launch.outputs(G, prepared, states)
        ctx.save_for_backward(
            q, k, v, G, None if prepared is None else prepared.scores, states, initial_state, cu_seqlens
        )
        ctx.scale, ctx.gate_dtype = scale, None if g is None else g.dtype
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, G, scores, states, initial_state, cu_seqlens = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else do.to(v.dtype).contiguous()
        dfinal = None if dfinal is None else dfinal.float().contiguous()
        launch = Launcher(q, k, v, G, ctx.scale, _chunks(q, cu_seqlens))
        prepared = launch.prepare(G, scores=False)
        wants_start = initial_state is not None and ctx.needs_input_grad[4]
        dstates, dstart = launch.state_gradients(do, G, prepared, dfinal, wants_start)
        dq, dk, dv, dg = launch.gradients(do, G, prepared, scores, states, dstates)
        dg = None if dg is None else dg.to(ctx.gate_dtype)
        dstart = None if dstart is None else dstart.to(initial_state.dtype)
        return dq, dk, dv, dg, dstart, None, None, None
