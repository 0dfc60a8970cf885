"""The gradient of the chunked delta rule where a head has one decay, or none.

Notation of `chunked.py`. With E the decays of pairs:

    G = [do eᵀ; −Y eᵀ] ⊙ E            dA and dP but for beta: what products of queries and keys see, times beta
    Z = G_q ⊙ (q kᵀ) + G_k ⊙ (k kᵀ)    column j sums to the gradient of beta_j, but for its part in the state; times beta, what
                                       stands in Z's rows from step t on and in its columns before t passes through the decay of t
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.delta_rule.chunked_gates import Gates, Pairs, Part, gates, parts, scatter
from kernels.delta_rule.chunked_head import Keys, key_side, operands, states_by_part, states_by_sequence
from kernels.delta_rule.layout import ChunkLayout


def backward_heads(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor | None,
    kept: tuple[Tensor, ...],
    do: Tensor,
    dstate: Tensor,
    scale: float,
    normalize_qk: bool,
    layout: ChunkLayout,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, v, beta, g, with tokens in their first dim, and of the initial state."""
    (H, K), (HV, V), C = q.shape[1:], do.shape[1:], layout.C
    dtype = dstate.dtype
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, do))
    dS = states_by_part(dstate, layout, H, dtype)
    gate = gates(beta, g, layout, H, dtype)
    sums = Sums(gate)
    spaces: dict[int, Pairs] = {}
    for group in reversed(list(parts(layout, H, HV))):
        keys = key_side(q, k, group[0], scale, normalize_qk, dtype)
        M, h, slab = keys.X.shape[0], group[0].H, group[0].slab
        if M not in spaces:
            spaces[M] = Pairs(M, C, dS)
        gradient = Keys(torch.empty_like(keys.X), None, torch.empty_like(keys.raw))
        for part in group:
            d = dS.new_empty(M, C, V)
            slab.pack(do[:, part.value_heads], d.view(-1, h, C, V))
            e, inverse, starts = (x[part.rows].to(dtype) for x in kept)
            pair = gate.pairs(part.rows, spaces[M])
            own = (e, inverse, starts, dS[part.states], d)
            Y = _part_backward(keys, gradient, part is group[0], gate, part, pair, *own, sums)
            slab.unpack(Y.view(-1, h, C, V), dv[:, part.value_heads])
        dX, draw = gradient.X, gradient.raw.view(M, 2 * C, C)
        dX.view(M, 2 * C, K).baddbmm_(draw, keys.X[:, 1])
        dX[:, 1] += torch.bmm(draw.mT, keys.X.view(M, 2 * C, K))
        _unit_length_backward_(dX, keys, scale)
        by_head = dX.view(-1, h, 2, C, K)
        slab.unpack(by_head[:, :, 0], dq[:, group[0].heads])
        slab.unpack(by_head[:, :, 1], dk[:, group[0].heads])
    dbeta = scatter(sums.beta(), torch.empty_like(beta, memory_format=torch.contiguous_format), layout, H)
    dg = None
    if g is not None:
        dg = scatter(sums.g(), torch.empty_like(g, memory_format=torch.contiguous_format), layout, H)
    return dq, dk, dv, dbeta, dg, states_by_sequence(dS, layout, H, HV)


class Sums:
    """What the gradients of beta and g are made of, over all chunks and value heads, [M, C]:

    columns, rows: of Z below its diagonal, beta in the rows'. diagonal: Z's. reads: of queries and keys that read the state.
    writes: of beta k that are written. whole [M, 1]: of the state that lives on.
    """

    def __init__(self, gate: Gates):
        self.gate = gate
        M, _, C = gate.beta.shape
        self.columns, self.rows, self.diagonal, self.reads, self.writes = gate.beta.new_empty(5, M, C).unbind()
        self.whole = gate.beta.new_empty(M, 1)

    def beta(self) -> Tensor:
        return torch.addcmul(self.diagonal.add_(self.columns), self.gate.to_end[..., 0], self.writes)

    def g(self) -> Tensor:
        """Reads and rows see the decays of their own step and those before, columns too, but for what they keep to themselves;
        a write sees those after its own."""
        gate, C = self.gate, self.gate.beta.shape[2]
        ones = gate.beta.new_ones(C, C)
        seen = self.rows.addcmul_(self.reads, gate.read[:, 0, :, 0]).addcmul_(self.columns, gate.beta[:, 0], value=-1.0)
        later = (self.writes * gate.write[..., 0]) @ ones.triu(1)
        return later.addmm_(seen, ones.tril()).addcmul_(self.whole, gate.whole[:, 0])


def _part_backward(
    keys: Keys,
    gradient: Keys,
    first: bool,
    gate: Gates,
    part: Part,
    pair: Tensor,
    e: Tensor,
    inverse: Tensor,
    starts: Tensor,
    dS: Tensor,
    do: Tensor,
    sums: Sums,
) -> Tensor:
    """The gradient of v [M, C, V], which is Y. starts: the states at the starts of chunks. Overwrites pair.

    Takes dS from the end of the slab to its start, in place; adds to the gradient of keys or, first, fills it.
    """
    rows, slab = part.rows, part.slab
    X, raw = keys.X, keys.raw
    beta, seen, later = gate.beta[rows], gate.read[rows, 0], gate.write[rows]
    read, write = operands(X, gate, part)
    ends, Y = torch.empty_like(starts), torch.empty_like(do)
    queried = torch.bmm(read[:, 0].mT, do)
    de = torch.bmm((raw[:, 0] * pair).mul_(beta).mT, do)
    split = (read[:, 1].mT, write, inverse.mT, de, Y, queried, gate.whole[rows])
    steps = list(zip(*(slab.split(x, part.H) for x in split)))
    after = slab.split(ends, part.H)
    after[-1].copy_(dS[: after[-1].shape[0]])
    for t in reversed(range(len(steps))):
        reads, writes, inverses, des, Ys, query, decay = steps[t]
        torch.bmm(inverses, des.baddbmm_(writes, after[t]), out=Ys)
        before, n = after[t - 1] if t else dS, reads.shape[0]
        torch.addcmul(query, after[t], decay, out=before[:n]).baddbmm_(reads, Ys, alpha=-1.0)
        if t and n < before.shape[0]:  # sequences that end before this step
            before[n:].copy_(dS[n : before.shape[0]])

    # Of keys as readers the gradients have their signs changed, as Y.
    dread = (torch.bmm(do, starts.mT), torch.bmm(Y, starts.mT))
    dwrite = torch.bmm(e, ends.mT)
    torch.sum(ends.mul_(starts).flatten(1), 1, keepdim=True, out=sums.whole[rows])
    torch.sum(dwrite * X[:, 1], -1, out=sums.writes[rows])
    torch.sum((dread[0] * X[:, 0]).addcmul_(dread[1], X[:, 1], value=-1.0), -1, out=sums.reads[rows])

    G = (torch.bmm(do, e.mT).mul_(pair), torch.bmm(Y, e.mT).mul_(pair))
    G[1].diagonal(dim1=1, dim2=2).zero_()
    Z = (G[0] * raw[:, 0]).addcmul_(G[1], raw[:, 1], value=-1.0)
    diagonal = Z.diagonal(dim1=1, dim2=2)
    sums.diagonal[rows] = diagonal
    # It has no decay, and would only leave rounding errors.
    diagonal.zero_()
    torch.sum(Z, 1, out=sums.columns[rows])
    sums.rows[rows] = torch.bmm(Z, beta.mT)[..., 0]

    if first:
        torch.mul(dread[0], seen, out=gradient.X[:, 0])
        torch.mul(dwrite, later, out=gradient.X[:, 1])
        torch.mul(G[0], beta, out=gradient.raw[:, 0])
        torch.mul(G[1], -beta, out=gradient.raw[:, 1])
    else:
        gradient.X[:, 0].addcmul_(dread[0], seen)
        gradient.X[:, 1].addcmul_(dwrite, later)
        gradient.raw[:, 0].addcmul_(G[0], beta)
        gradient.raw[:, 1].addcmul_(G[1], beta, value=-1.0)
    gradient.X[:, 1].addcmul_(dread[1], seen, value=-1.0)
    return Y


def _unit_length_backward_(dX: Tensor, keys: Keys, scale: float) -> None:
    """Through x · rsqrt(Σ x² + 1e-6): the part along x falls away, as far as the 1e-6 lets it."""
    X, lengths = keys.X, keys.lengths
    if lengths is None:
        dX[:, 0] *= scale
        return
    along = (X * dX).sum(-1, keepdim=True).mul_(lengths)
    along[:, 0] /= scale**2  # X holds scale · unit q, and lengths scale / |q|
    dX.mul_(lengths).addcmul_(X, along, value=-1.0)
