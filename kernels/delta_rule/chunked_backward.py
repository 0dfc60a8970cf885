"""The gradient of the chunked delta rule.

Notation of `chunked.py`, with T = (I + P)^-1, dS the gradient of the state at the END of a chunk, and [a; b] rows
stacked:

    de = Aᵀ do + w_end dS          Y = Tᵀ de          dv = Y
    dA = tril(do eᵀ)               dP = −stril(Y eᵀ)       since d(T r) through T is −(Tᵀ de)(T r)ᵀ
    dXe = [do; −Y] Sᵀ              dw_end = e dSᵀ
    dS' = decay(chunk) dS + Xeᵀ [do; −Y]                   the gradient at the chunk's start

So the keys act as further queries, whose output gradient is −Y. The gradient of a step's log decay sums what passes
over that step: rows at or after it, columns before it, and the state itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.delta_rule.chunked import advance_, first_state, prepare
from kernels.delta_rule.decays import Decays, mask_, scores_backward
from kernels.delta_rule.layout import ChunkLayout


def backward_chunks(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    e: Tensor,
    inverse: Tensor,
    do: Tensor,
    dstate: Tensor,
    scale: float,
    normalize_qk: bool,
    layout: ChunkLayout,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, v, beta, g and initial_state, in the accumulation dtype."""
    H, HV, K, V = q.shape[2], do.shape[2], q.shape[3], do.shape[3]
    C = layout.C
    chunks = prepare(q, k, beta, g, scale, normalize_qk, layout)
    M = chunks.w.shape[0]
    X, w, decays = chunks.X, chunks.w, chunks.decays

    # The states at the start of every chunk, computed again rather than kept from the forward pass: 2 of some 30
    # products.
    states = w.new_empty(M, K, V)
    state = first_state(initial_state, layout, HV, K, V, w)
    for a, b in layout.steps:
        now, S = slice(a * HV, b * HV), state[: (b - a) * HV]
        states[now] = S
        advance_(S, chunks, e, now)

    D = w.new_empty(M, 2, C, V)  # [do; -Y]
    layout.pack(do, out=D.view(layout.chunks, HV, 2, C, V)[:, :, 0])
    de = torch.bmm(chunks.score[:, 0].mT, D[:, 0])
    dXe, dw_end = torch.empty_like(chunks.Xe), torch.empty_like(w)
    dwhole = None if decays.whole is None else w.new_empty(M, K)
    dstate = layout.sort_states(dstate).to(w.dtype, copy=True).view(layout.N * HV, K, V)
    for a, b in reversed(layout.steps):
        now, dS = slice(a * HV, b * HV), dstate[: (b - a) * HV]
        torch.bmm(e[now], dS.mT, out=dw_end[now])
        if dwhole is not None:
            torch.sum(states[now] * dS, -1, out=dwhole[now])
        de[now].baddbmm_(chunks.w_end[now], dS)
        torch.neg(torch.bmm(inverse[now].mT, de[now]), out=D[now, 1])
        rows = D[now].view(-1, 2 * C, V)
        torch.bmm(rows, states[now].mT, out=dXe[now])
        if decays.whole is not None:
            dS *= decays.whole[now]
        dS.baddbmm_(chunks.Xe[now].mT, rows)

    dM = mask_(torch.bmm(D.view(M, 2 * C, V), e.mT).view(M, 2, C, C))
    dX, dw, dG = scores_backward(dM, X, w, decays, chunks.score)
    dXe = dXe.view_as(X)
    dg = None
    if dwhole is not None:
        dg = _decay_gradient(chunks.Xe.view_as(X), dXe, chunks.w_end, dw_end, dwhole, dG, decays)
        dg = layout.unpack(dg.view(layout.chunks, HV, C, -1), dg.dtype)
        dX.addcmul_(dXe, decays.from_start[:, None])
        dw.addcmul_(dw_end, decays.to_end)
        if g is not None:
            dg = dg.view(g.shape)
    else:
        dX += dXe
        dw += dw_end

    dbeta = (dw * X[:, 1]).sum(-1)
    dX[:, 1].addcmul_(dw, chunks.beta)
    dX[:, 0] *= scale
    if chunks.lengths is not None:
        # X holds scaled queries; the projection needs unit ones.
        unit = X.clone()
        unit[:, 0] /= scale
        dX -= unit * (unit * dX).sum(-1, keepdim=True)
        dX *= chunks.lengths
    dX = dX.view(layout.chunks, H, HV // H, 2, C, K).sum(2)
    dq, dk = (layout.unpack(dX[:, :, i], dX.dtype) for i in range(2))
    dv = layout.unpack(D[:, 1].neg().view(layout.chunks, HV, C, V), w.dtype)
    dbeta = layout.unpack(dbeta.view(layout.chunks, HV, C), w.dtype)
    return dq, dk, dv, dbeta, dg, layout.unsort_states(dstate.view(layout.N, HV, K, V))


def _decay_gradient(
    Xe: Tensor, dXe: Tensor, w_end: Tensor, dw_end: Tensor, dwhole: Tensor, dG: Tensor | None, decays: Decays
) -> Tensor:
    """dg [M, C, D] from what the decays of `chunked.py` touch.

    dwhole [M, K] is rowsum(S dS); dG [M, C, D] the gradient, from the scores, towards the sum of g up to each step.
    """
    rows, columns = (Xe * dXe).sum(1), w_end * dw_end
    dwhole = dwhole * decays.whole[..., 0] if decays.whole is not None else dwhole
    if not decays.per_channel:
        rows, columns, dwhole = rows.sum(-1, keepdim=True), columns.sum(-1, keepdim=True), dwhole.sum(-1, keepdim=True)
    if dG is not None:
        rows = rows + dG
    # Columns before the step, summed forward: "all columns minus those from the step on" would cancel.
    past = torch.cumsum(columns, 1) - columns
    return rows.flip(1).cumsum(1).flip(1) + past + dwhole[:, None]
