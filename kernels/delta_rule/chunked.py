"""The delta rule by chunks of C tokens, in plain torch: the production path on CPU.

With w = beta k (what is written), Xe = [q; k] decayed from the chunk's start, and E the decay from column j to row i:

    A = tril(q wᵀ ⊙ E)      P = stril(k wᵀ ⊙ E)         what tokens of the chunk read from each other's writes
    e = (I + P)^-1 (v − Xe_k S)                         what each token finds wrong: S̃ᵀ k is subtracted from v
    o = Xe_q S + A e
    S' = decay(chunk) S + (w decayed to the chunk's end)ᵀ e

This is the WY form of Yang et al. 2024 (arXiv:2406.06484, 2412.06464; per channel in arXiv:2510.26692), written in the
errors e rather than in the corrected values beta e. Then beta lives in w alone and no gradient divides by it. Only the
last line is sequential over chunks. The gradient is derived in `chunked_backward.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels.delta_rule.decays import Decays, scores
from kernels.delta_rule.layout import ChunkLayout, chunk_layout
from kernels.delta_rule.triangular import unit_lower_inverse


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
    layout = chunk_layout(q, cu_seqlens, chunk_size)
    o, state = _DeltaRule.apply(q, k, v, beta, g, initial_state, scale, normalize_qk, layout)
    return o, state if output_final_state else None


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
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
        with torch.autocast(q.device.type, enabled=False):
            chunks = prepare(q, k, beta, g, scale, normalize_qk, layout)
            o, state, e, inverse = forward_chunks(chunks, v, initial_state, layout)
        ctx.save_for_backward(q, k, beta, g, initial_state, e, inverse)
        ctx.scale, ctx.normalize_qk, ctx.layout = scale, normalize_qk, layout
        ctx.v_dtype = v.dtype
        return o, state

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        from kernels.delta_rule.chunked_backward import backward_chunks

        q, k, beta, g, initial_state, e, inverse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            grads = backward_chunks(
                q, k, beta, g, initial_state, e, inverse, do, dstate, ctx.scale, ctx.normalize_qk, ctx.layout
            )
        dq, dk, dv, dbeta, dg, dinitial = grads
        return (
            dq.to(q.dtype),
            dk.to(k.dtype),
            dv.to(ctx.v_dtype),
            dbeta.to(beta.dtype),
            None if dg is None or g is None else dg.to(g.dtype),
            None if initial_state is None else dinitial.to(initial_state.dtype),
            None,
            None,
            None,
        )


@dataclass
class Chunks:
    """Operands of all chunks and value heads, the first dim of every tensor, in the order of the layout."""

    X: Tensor  # [M, 2, C, K] queries (scaled) and keys, normalised where asked
    w: Tensor  # [M, C, K] beta k
    beta: Tensor  # [M, C, 1]
    score: Tensor  # [M, 2, C, C] A and P
    decays: Decays
    Xe: Tensor  # [M, 2C, K] X decayed from the start of the chunk
    w_end: Tensor  # [M, C, K] w decayed to the end of the chunk
    lengths: Tensor | None  # [M, 2, C, 1] 1 / |q|, 1 / |k| where normalised


def prepare(
    q: Tensor, k: Tensor, beta: Tensor, g: Tensor | None, scale: float, normalize_qk: bool, layout: ChunkLayout
) -> Chunks:
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    H, HV, K = q.shape[2], beta.shape[2], q.shape[3]
    M, C = layout.chunks * HV, layout.C
    X = q.new_empty(layout.chunks, HV, 2, C, K, dtype=accumulate)
    for r in range(HV // H):
        layout.pack(q, out=X[:, r :: HV // H, 0])
        layout.pack(k, out=X[:, r :: HV // H, 1])
    X = X.view(M, 2, C, K)
    lengths = None
    if normalize_qk:
        lengths = torch.linalg.vector_norm(X, dim=-1, keepdim=True).square_().add_(1e-6).rsqrt_()
        X *= lengths
    X[:, 0] *= scale
    packed_beta = layout.pack(beta.to(accumulate)).view(M, C, 1)
    w = X[:, 1] * packed_beta
    alpha = None
    if g is not None:
        alpha = layout.pack(g.to(accumulate)).view(M, C, -1).exp()
    score, decays = scores(X, w, alpha)
    if decays.from_start is None or decays.to_end is None:
        Xe, w_end = X, w
    else:
        Xe, w_end = X * decays.from_start[:, None], w * decays.to_end
    return Chunks(X, w, packed_beta, score, decays, Xe.view(M, 2 * C, K), w_end, lengths)


def forward_chunks(
    chunks: Chunks, v: Tensor, initial_state: Tensor | None, layout: ChunkLayout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns o [B, T, HV, V], the final state [N, HV, K, V], the errors e [M, C, V] and (I + P)^-1 [M, C, C]."""
    HV, V = v.shape[2:]
    C, K = layout.C, chunks.w.shape[-1]
    inverse = unit_lower_inverse(chunks.score[:, 1])
    values = layout.pack(v, out=chunks.w.new_empty(layout.chunks, HV, C, V)).view(-1, C, V)
    state = first_state(initial_state, layout, HV, K, V, chunks.w)
    e, o = torch.empty_like(values), torch.empty_like(values)
    for a, b in layout.steps:
        now, S = slice(a * HV, b * HV), state[: (b - a) * HV]
        read = torch.bmm(chunks.Xe[now], S)
        torch.bmm(inverse[now], values[now] - read[:, C:], out=e[now])
        o[now] = read[:, :C]
        advance_(S, chunks, e, now)
    o.baddbmm_(chunks.score[:, 0], e)
    final = layout.unsort_states(state.view(layout.N, HV, K, V))
    return layout.unpack(o.view(layout.chunks, HV, C, V), v.dtype), final, e, inverse


def first_state(initial_state: Tensor | None, layout: ChunkLayout, HV: int, K: int, V: int, like: Tensor) -> Tensor:
    """The states before the first chunk, a fresh tensor [N * HV, K, V] in the layout's order."""
    if initial_state is None:
        return like.new_zeros(layout.N * HV, K, V)
    state = layout.sort_states(initial_state).to(like.dtype, copy=True, memory_format=torch.contiguous_format)
    return state.view(layout.N * HV, K, V)


def advance_(S: Tensor, chunks: Chunks, e: Tensor, now: slice) -> None:
    """Takes the states S over the chunks `now`, in place."""
    if chunks.decays.whole is not None:
        S *= chunks.decays.whole[now]
    S.baddbmm_(chunks.w_end[now].mT, e[now])
