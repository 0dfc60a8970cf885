"""The delta rule by chunks of C tokens, in plain torch: the production path on CPU.

With w = beta k (what is written), Xe = [q; k] decayed from the chunk's start, and E the decay from column j to row i:

    A = tril(q wᵀ ⊙ E)      P = stril(k wᵀ ⊙ E)         what tokens of the chunk read from each other's writes
    e = (I + P)^-1 (v − Xe_k S)                         what each token finds wrong: v minus what S̃ answers to its key
    o = Xe_q S + A e
    S' = decay(chunk) S + (w decayed to the chunk's end)ᵀ e

This is the WY form of Yang et al. 2024 (arXiv:2406.06484, 2412.06464; per channel in arXiv:2510.26692), written in the
errors e rather than in the corrected values beta e. Then beta lives in w alone and no gradient divides by it. Only the
reads and the write of S are sequential over chunks. The gradient is derived in `chunked_backward.py`.

The chunks are worked on in slabs, runs of steps of the scan, so that temporaries stay small whatever T. Kept for the
backward pass: e, the scores, the inverses, and the states at the starts of slabs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.delta_rule.decays import Decays, chunk_decays
from kernels.delta_rule.layout import ChunkLayout, Slab, chunk_layout
from kernels.delta_rule.scores import channel_scores, scores


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
    layout = chunk_layout(q, cu_seqlens, v.shape[2], chunk_size)
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
        with torch.autocast(q.device.type, enabled=False):
            o, state, kept = forward_slabs(q, k, v, beta, g, initial_state, scale, normalize_qk, layout, recording)
        if recording:
            ctx.save_for_backward(q, k, beta, g, *kept)
        ctx.scale, ctx.normalize_qk, ctx.layout = scale, normalize_qk, layout
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        return o, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        # Here, not above: the backward module builds on this one.
        from kernels.delta_rule.chunked_backward import backward_slabs

        q, k, beta, g, e, score, inverse, states = ctx.saved_tensors
        with torch.autocast(do.device.type, enabled=False):
            *grads, dinitial = backward_slabs(
                q, k, beta, g, e, score, inverse, states, do, dstate, ctx.scale, ctx.normalize_qk, ctx.layout
            )
        return *grads, None if ctx.state_dtype is None else dinitial.to(ctx.state_dtype), None, None, None


@dataclass
class Chunks:
    """The chunks of a slab: M chunks times value heads, in the order of the layout.

    What goes into matrix products is rounded to the operand dtype; the rest has the accumulation dtype.
    """

    X: Tensor  # [M, 2, C, K] queries (scaled) and keys, normalised where asked
    w: Tensor  # [M, C, K] beta k
    beta: Tensor  # [M, C, 1]
    lengths: Tensor | None  # [M, 2, C, 1] 1 / |q|, 1 / |k| where normalised
    decays: Decays | None
    rows: Tensor  # [M, 2C, K] X as an operand
    columns: Tensor  # [M, C, K] w as an operand
    read: Tensor  # [M, 2C, K] rows; where every channel has its own decay, decayed from the start of the chunk
    write: Tensor  # [M, C, K] columns decayed to the end of the chunk

    @property
    def late_decay(self) -> Tensor | None:
        """[M, C, 1] what reads of the state still lack: the decay of a head, cheaper on the product."""
        return None if self.decays is None or self.decays.pair is None else self.decays.from_start


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of states, decays, gates and everything elementwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_dtype(q: Tensor) -> torch.dtype:
    """Of the operands of matrix products: bf16 for bf16 inputs where the processor multiplies it faster than fp32.

    fp16 is widened: sums of a chunk can leave its range.
    """
    if q.dtype == torch.bfloat16 and (q.device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return torch.bfloat16
    return accumulation_dtype(q.dtype)


def prepare(
    q: Tensor, k: Tensor, beta: Tensor, g: Tensor | None, scale: float, normalize_qk: bool, slab: Slab
) -> Chunks:
    H, HV, K = q.shape[2], beta.shape[2], q.shape[3]
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
    rows, columns = X.view(M, 2 * C, K).to(operands), w.to(operands)
    read, write, decays = rows, columns, None
    if g is not None:
        decays = chunk_decays(slab.pack(g, X.new_empty(m, HV, C, *g.shape[3:])).view(M, C, -1).exp_())
        write = (w * decays.to_end).to(operands)
        if decays.pair is None:
            read = (X * decays.from_start[:, None]).view(M, 2 * C, K).to(operands)
    return Chunks(X, w, strength, lengths, decays, rows, columns, read, write)


def forward_slabs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    normalize_qk: bool,
    layout: ChunkLayout,
    recording: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Returns o [B, T, HV, V], the final state [N, HV, K, V], and what the backward pass needs where recording:
    e [M, C, V], the scores A and P [M, 2, C, C], (I + P)^-1 [M, C, C] and the states before each slab
    [slabs, N · HV, K, V], the last in the accumulation dtype and the others in that of operands.
    """
    HV, K, V, C = v.shape[2], q.shape[3], v.shape[3], layout.C
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
        if chunks.decays is None or chunks.decays.pair is not None:
            score = scores(chunks.rows, chunks.columns, chunks.decays)
        else:
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
    reads, writes, value, inverses, errors, outs = (
        slab.split(x, HV) for x in (chunks.read, chunks.write, values, inverse, e, out)
    )
    late = None if chunks.late_decay is None else slab.split(chunks.late_decay, HV)
    whole = None if chunks.decays is None else slab.split(chunks.decays.whole, HV)
    for t in range(len(slab.sizes)):
        now = S[: len(reads[t])]
        answers = torch.bmm(reads[t], now.to(e.dtype))
        if late is None:
            outs[t].copy_(answers[:, :C])
            error = value[t].sub_(answers[:, C:])
        else:
            torch.mul(answers[:, :C], late[t], out=outs[t])
            error = value[t].addcmul_(answers[:, C:], late[t], value=-1.0)
        torch.bmm(inverses[t], error.to(e.dtype), out=errors[t])
        if whole is not None:
            now *= whole[t]
        add_product_(now, writes[t].mT, errors[t])
    return out


def add_product_(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x += a b, batched, where x may be of a wider dtype than a and b."""
    return x.baddbmm_(a, b) if x.dtype == a.dtype else x.add_(torch.bmm(a, b))


def unit_lower_inverse(P: Tensor) -> Tensor:
    """(I + P)^-1 for strictly lower triangular P [M, C, C], by substitution.

    Products of powers, (I - P)(I + P^2)(I + P^4)..., cancel badly: for beta = 2 and equal keys P^8 has entries near 1e6
    already in a block of 16, which must sum to entries near 1.
    """
    identity = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device).expand_as(P)
    return torch.linalg.solve_triangular(P, identity, upper=False, unitriangular=True)
