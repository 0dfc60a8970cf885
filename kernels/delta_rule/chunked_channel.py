"""The delta rule by chunks where every channel decays by itself: the forward pass. Notation of `chunked.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.delta_rule.chunked_head import unit_lower_inverse
from kernels.delta_rule.decays import Decays, chunk_decays
from kernels.delta_rule.layout import ChunkLayout, Slab
from kernels.delta_rule.precision import accumulation_dtype, operand_dtype
from kernels.delta_rule.scores import channel_scores


@dataclass
class Chunks:
    """The chunks of a slab: M chunks times value heads, in the order of the layout.

    What goes into matrix products is rounded to the operand dtype; the rest has the accumulation dtype.
    """

    X: Tensor  # [M, 2, C, K] queries (scaled) and keys, normalised where asked
    w: Tensor  # [M, C, K] beta k
    beta: Tensor  # [M, C, 1]
    lengths: Tensor | None  # [M, 2, C, 1] 1 / |q|, 1 / |k| where normalised
    decays: Decays
    read: Tensor  # [M, 2C, K] X as an operand, decayed from the start of the chunk
    write: Tensor  # [M, C, K] w as an operand, decayed to the end of the chunk


def prepare(q: Tensor, k: Tensor, beta: Tensor, g: Tensor, scale: float, normalize_qk: bool, slab: Slab) -> Chunks:
    (H, K), HV = q.shape[1:], beta.shape[1]
    m, C = sum(slab.sizes), slab.C
    M = m * HV
    X = q.new_empty(m, HV, 2, C, K, dtype=accumulation_dtype(q.dtype))
    for r in range(HV // H):
        slab.pack(q, X[:, r :: HV // H, 0])
        slab.pack(k, X[:, r :: HV // H, 1])
    X = X.view(M, 2, C, K)
    lengths = None
    if normalize_qk:
        lengths = torch.linalg.vector_norm(X, dim=-1, keepdim=True).square_().add_(1e-6).rsqrt_()
        X *= lengths
    X[:, 0] *= scale
    strength = slab.pack(beta, X.new_empty(m, HV, C)).view(M, C, 1)
    w = X[:, 1] * strength
    operands = operand_dtype(q)
    decays = chunk_decays(slab.pack(g, X.new_empty(m, HV, C, K)).view(M, C, K).exp_())
    write = (w * decays.to_end).to(operands)
    read = (X * decays.from_start[:, None]).view(M, 2 * C, K).to(operands)
    return Chunks(X, w, strength, lengths, decays, read, write)


def forward_channels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    scale: float,
    normalize_qk: bool,
    layout: ChunkLayout,
    recording: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """q, k [tokens, H, K], v [tokens, HV, V], beta [tokens, HV], g [tokens, HV, K].

    Returns o [tokens, HV, V], the final state [N, HV, K, V], and what the backward pass needs where recording:
    e [M, C, V], the scores A and P [M, 2, C, C], (I + P)^-1 [M, C, C] and the states before each slab
    [slabs, N · HV, K, V], the last in the accumulation dtype and the others in that of operands.
    """
    HV, K, V, C = v.shape[1], q.shape[2], v.shape[2], layout.C
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    S = v.new_zeros(layout.N, HV, K, V, dtype=accumulation_dtype(v.dtype))
    if initial_state is not None:
        S.copy_(layout.sort_states(initial_state))
    S = S.view(layout.N * HV, K, V)
    operands = operand_dtype(q)
    kept: tuple[Tensor, ...] = ()
    if recording:
        total = layout.chunks * HV
        shapes = ((total, C, V), (total, 2, C, C), (total, C, C))
        kept = (*(q.new_empty(x, dtype=operands) for x in shapes), S.new_empty(len(layout.slabs), *S.shape))
    for i, slab in enumerate(layout.slabs):
        chunks = prepare(q, k, beta, g, scale, normalize_qk, slab)
        values = slab.pack(v, S.new_empty(sum(slab.sizes), HV, C, V)).view(-1, C, V)
        score = channel_scores(chunks.X, chunks.w, chunks.decays, operands)
        inverse = unit_lower_inverse(score[:, 1].to(S.dtype)).to(operands)
        if recording:
            e, *rest = (x[slab.rows(HV)] for x in kept[:3])
            rest[0].copy_(score)
            rest[1].copy_(inverse)
            kept[3][i] = S
        else:
            e = torch.empty_like(values, dtype=operands)
        out = _scan(S, chunks, values, inverse, e, slab, HV)
        out.baddbmm_(score[:, 0].to(operands), e)
        slab.unpack(out.view(-1, HV, C, V), o)
    return o, layout.unsort_states(S.view(layout.N, HV, K, V)), kept


def _scan(S: Tensor, chunks: Chunks, values: Tensor, inverse: Tensor, e: Tensor, slab: Slab, HV: int) -> Tensor:
    """Takes the states S through the slab, in place. Fills e; returns what the queries read from S. Overwrites values."""
    C = slab.C
    out = torch.empty_like(e)
    steps = (chunks.read, chunks.write, values, inverse, e, out, chunks.decays.whole)
    for reads, writes, value, inverses, errors, outs, whole in zip(*(slab.split(x, HV) for x in steps)):
        now = S[: len(reads)]
        answers = torch.bmm(reads, now.to(e.dtype))
        outs.copy_(answers[:, :C])
        torch.bmm(inverses, value.sub_(answers[:, C:]).to(e.dtype), out=errors)
        now *= whole
        add_product_(now, writes.mT, errors)
    return out


def add_product_(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x += a b, batched, where x may be of a wider dtype than a and b."""
    return x.baddbmm_(a, b) if x.dtype == a.dtype else x.add_(torch.bmm(a, b))
