"""The gradient of the chunked delta rule where every channel decays by itself: `chunked.py` derives it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.delta_rule.chunked_channel import Chunks, add_product_, prepare
from kernels.delta_rule.layout import ChunkLayout, Slab
from kernels.delta_rule.scores import channel_scores_backward


def backward_channels(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor,
    kept: tuple[Tensor, ...],
    do: Tensor,
    dstate: Tensor,
    scale: float,
    normalize_qk: bool,
    layout: ChunkLayout,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, g, with tokens in their first dim, and, in the accumulation dtype, of the initial state."""
    (H, K), (HV, V), C = q.shape[1:], do.shape[1:], layout.C
    e, score, inverse, states = kept
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, do))
    dbeta, dg = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (beta, g))
    dS = layout.sort_states(dstate).to(states.dtype, copy=True).view(layout.N * HV, K, V)
    for slab, S in zip(reversed(layout.slabs), reversed(states.unbind(0))):
        rows = slab.rows(HV)
        chunks = prepare(q, k, beta, g, scale, normalize_qk, slab)
        D = e.new_empty(sum(slab.sizes), HV, 2, C, V)  # [do; -Y]
        slab.pack(do, D[:, :, 0])
        D = D.view(-1, 2, C, V)
        dX, dw, dlog = _slab_backward(chunks, S, dS, e[rows], score[rows], inverse[rows], D, slab, HV)

        slab.unpack(D[:, 1].neg_().view(-1, HV, C, V), dv)
        slab.unpack((dw * chunks.X[:, 1]).sum(-1).view(-1, HV, C), dbeta)
        slab.unpack(dlog.view(-1, HV, C, K), dg)
        dX[:, 1].addcmul_(dw, chunks.beta)
        if chunks.lengths is not None:
            _unit_length_backward_(dX, chunks.X, chunks.lengths, scale)
        else:
            dX[:, 0] *= scale
        dX = dX.view(-1, H, HV // H, 2, C, K)
        dX = dX[:, :, 0] if H == HV else dX.sum(2)
        slab.unpack(dX[:, :, 0], dq)
        slab.unpack(dX[:, :, 1], dk)
    return dq, dk, dv, dbeta, dg, layout.unsort_states(dS.view(layout.N, HV, K, V))


def _slab_backward(
    chunks: Chunks, S: Tensor, dS: Tensor, e: Tensor, score: Tensor, inverse: Tensor, D: Tensor, slab: Slab, HV: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dX [M, 2, C, K], dw [M, C, K] and dg [M, C, K] of a slab, given the states S before it.

    Takes dS from the end of the slab to its start, in place, and fills D[:, 1] with -Y.
    """
    M, _, C, V = D.shape
    decays = chunks.decays
    reads, writes, errors, inverses, Ds, whole = (
        slab.split(x, HV) for x in (chunks.read, chunks.write, e, inverse, D.view(M, 2 * C, V), decays.whole)
    )

    # The states are computed again rather than kept from the forward pass: 2 of some 30 products.
    starts = [S]
    for t in range(len(slab.sizes) - 1):
        S = starts[-1][: len(reads[t])] * whole[t]
        starts.append(add_product_(S, writes[t].mT, errors[t]))

    de = torch.bmm(score[:, 0].mT, D[:, 0])
    dread, dwrite = torch.empty_like(chunks.read), torch.empty_like(chunks.write)
    dwhole = S.new_empty(M, S.shape[1])
    des, dreads, dwrites, dwholes = (slab.split(x, HV) for x in (de, dread, dwrite, dwhole))
    for t in reversed(range(len(slab.sizes))):
        S = starts[t][: len(reads[t])]
        now = dS[: len(reads[t])]
        dnow = now.to(e.dtype)
        torch.bmm(errors[t], dnow.mT, out=dwrites[t])
        torch.sum(S * now, -1, out=dwholes[t])
        des[t].baddbmm_(writes[t], dnow)
        torch.neg(torch.bmm(inverses[t].mT, des[t]), out=Ds[t][:, C:])
        torch.bmm(Ds[t], S.to(e.dtype).mT, out=dreads[t])
        now *= whole[t]
        add_product_(now, reads[t].mT, Ds[t])

    dscore = torch.bmm(D.view(M, 2 * C, V), e.mT).view(M, 2, C, C)
    X, w = chunks.X, chunks.w
    dwhole *= decays.whole[..., 0]
    dX, dw, dG, diagonal = channel_scores_backward(dscore, X, w, decays)
    dread = dread.view_as(X) * decays.from_start[:, None]
    dwrite = dwrite * decays.to_end
    dg = _sums(dG.add_((X * dread).sum(1)), w * dwrite, dwhole)
    dX += dread
    dX[:, 0].addcmul_(diagonal, w)
    return dX, dw.add_(dwrite).addcmul_(diagonal, X[:, 0]), dg


def _sums(from_step: Tensor, before_step: Tensor, always: Tensor) -> Tensor:
    """dg [M, C, K] of each step: the first argument from that step on, the second before it, and the third [M, K].

    One product with two triangles of ones: a running sum along a strided dim is slower. "All minus those from the step
    on" would cancel.
    """
    C = from_step.shape[1]
    ones = from_step.new_ones(C, C)
    triangles = torch.cat([ones.triu(), ones.tril(-1)], 1).expand(len(from_step), C, 2 * C)
    return torch.baddbmm(always[:, None], triangles, torch.cat([from_step, before_step], 1))


def _unit_length_backward_(dX: Tensor, X: Tensor, lengths: Tensor, scale: float) -> None:
    """Through x · rsqrt(Σ x² + 1e-6): the part along x falls away, as far as the 1e-6 lets it. X holds scale · unit q."""
    for i, s in ((0, scale), (1, 1.0)):
        d = dX[:, i]
        along = (X[:, i] * d).sum(-1, keepdim=True) / s
        d.mul_(s).addcmul_(X[:, i], along, value=-1.0).mul_(lengths[:, i])
