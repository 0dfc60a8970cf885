"""The chunk form itself, forward and backward, for any gate: see `operands.Decay` for what a gate supplies.

Sources: GLA (arXiv:2312.06635, section 4 and appendix C) and Mamba-2 (arXiv:2405.21060, section 6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gated_linear_attention.operands import Decay, Operands
from kernels.gated_linear_attention.plan import Segment

Gate = Callable[[Operands, Segment], Decay]


def _fetch_qk(x: Operands, segment: Segment) -> tuple[Tensor, Tensor]:
    return segment.fetch(x.q, x.repeat, x.compute), segment.fetch(x.k, x.repeat, x.compute)


def _by_piece(x: Tensor | None, segment: Segment) -> list[Tensor | None]:
    return [None] * len(segment.sizes) if x is None else [*x.split(segment.sizes)]


def _scan(
    kept: Tensor, added: Tensor, decay: Decay, segment: Segment, state: Tensor, *, backwards: bool = False
) -> None:
    """state <- total state + half added, chunk by chunk, and kept = half state before each.

    kept, added [m, H, K, R, V]; state [N, H, K, R, V], moved on in place. backwards: from the last chunk to the first.
    """
    pieces = list(
        zip(
            segment.states(state),
            _by_piece(kept, segment),
            _by_piece(added, segment),
            _by_piece(decay.half, segment),
            _by_piece(decay.total, segment),
        )
    )
    for here, before, increment, half, total in reversed(pieces) if backwards else pieces:
        assert before is not None and increment is not None
        if half is not None and total is not None:
            torch.mul(here, half, out=before)
            here.mul_(total).addcmul_(increment, half)
        else:
            before.copy_(here)
            if total is not None:
                here.mul_(total)
            here.add_(increment)


def forward(x: Operands, gate: Gate, state: Tensor, o: Tensor, starts: Tensor | None) -> None:
    """Writes o [tokens + 1, H R, V] and moves `state` [N, H, K, R, V] (sorted) to the end of each sequence.

    starts [M H, K, R V], if given, receives half S at the start of every chunk, for the backward.
    """
    for segment in x.plan.segments(x.size):
        q, k = _fetch_qk(x, segment)
        v = segment.fetch(x.v, 1, x.compute)
        decay = gate(x, segment)
        query, key, value = decay.query(q), decay.key(k), x.fold(decay.value(v))
        written = torch.bmm(key.transpose(1, 2), value)
        start = torch.empty_like(written) if starts is None else starts[segment.first * x.H : segment.last * x.H]
        _scan(start.view(x.state_shape), written.view(x.state_shape), decay, segment, state)
        read = torch.bmm(query, start)
        if decay.factored:
            inside = torch.bmm(query, key.transpose(1, 2)).tril_()
            out = decay.output(x.unfold(read.baddbmm_(inside, value)))
        else:
            out = decay.output(x.unfold(read)).baddbmm_(decay.scores(q, k), v)
        segment.put(o, out)


@dataclass(frozen=True)
class Gradients:
    """To be filled, one token longer than the operands: dq, dk [.., H, K]; dv [.., H R, V]; dg as g, or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None


def backward(x: Operands, gate: Gate, do: Tensor, starts: Tensor, dstate: Tensor, gradients: Gradients) -> None:
    """Fills `gradients`; dstate [N, H, K, R, V] (sorted) turns from the final states' gradient into the initial states'.

    do [tokens, H R, V]; starts as `forward` gave them.

    The gate's gradient at token t is what passes from tokens before t to tokens from t on. It is summed up from just these
    passages: from earlier chunks into this one, from this one into later ones, past it, and inside it. (The shorter
    Σ_{i >= t} (q_i·dq_i - k_i·dk_i) takes them as a difference of sums that also hold everything else, and is left with
    rounding noise where the decay is strong.)
    """
    for segment in reversed(x.plan.segments(x.size)):
        q, k = _fetch_qk(x, segment)
        v, d = segment.fetch(x.v, 1, x.compute), segment.fetch(do, 1, x.compute)
        decay = gate(x, segment)
        query, key, value, seen = decay.query(q), decay.key(k), x.fold(decay.value(v)), x.fold(decay.output(d))
        start = starts[segment.first * x.H : segment.last * x.H]
        read = torch.bmm(query.transpose(1, 2), seen)  # gradient of half S through the chunk's outputs
        ends = torch.empty_like(read)  # gradient of W
        _scan(ends.view(x.state_shape), read.view(x.state_shape), decay, segment, dstate, backwards=True)

        # Through the state: what earlier chunks give to this one, and this one to later chunks.
        dquery = torch.bmm(seen, start.transpose(1, 2))
        dkey = torch.bmm(value, ends.transpose(1, 2))
        dvalue = torch.bmm(key, ends)
        dg = None
        if gradients.g is not None:
            if x.R == 1:
                read_here, written_here = query * dquery, key * dkey
            else:  # dquery and dkey are sums over value heads; for each of them q·dq = o·do and k·dk = v·dv
                read_here = x.unfold(torch.bmm(query, start)) * x.unfold(seen)
                written_here = decay.value(v) * x.unfold(dvalue)
            past = decay.past((start * ends).view(x.state_shape))
            dg = _passages(decay.per_gate(read_here), decay.per_gate(written_here), past)

        # Through the scores inside the chunk. With a gate, a token's score for itself, which passes no decay, is kept apart.
        if dg is None:
            inside = torch.bmm(query, key.transpose(1, 2)).tril_()
            dinside = torch.bmm(seen, value.transpose(1, 2)).tril_()
            dv = decay.value(x.unfold(dvalue.baddbmm_(inside.transpose(1, 2), seen)))
            dq = decay.query(dquery.baddbmm_(dinside, key))
            dk = decay.key(dkey.baddbmm_(dinside.transpose(1, 2), query))
        elif decay.factored:
            inside = torch.bmm(query, key.transpose(1, 2))
            dinside = torch.bmm(seen, value.transpose(1, 2))
            own_score = x.of_values(_diagonal(inside)) * decay.own_score
            own_dscore = _diagonal(dinside) * decay.own_dscore
            inside.tril_(-1)
            dinside.tril_(-1)
            dquery_inside = torch.bmm(dinside, key)
            dkey_inside = torch.bmm(dinside.transpose(1, 2), query)
            if x.R > 1:
                dinside = torch.bmm(x.unfold(seen), decay.value(v).transpose(1, 2))
            dg += decay.gradient_inside(x.of_values(inside), dinside, query, dquery_inside, key, dkey_inside)
            dv = decay.value(x.unfold(dvalue.baddbmm_(inside.transpose(1, 2), seen))).addcmul_(own_score, d)
            dq = decay.query(dquery.add_(dquery_inside)).addcmul_(own_dscore, k)
            dk = decay.key(dkey.add_(dkey_inside)).addcmul_(own_dscore, q)
        else:
            scores, dscores = decay.scores(q, k), torch.bmm(d, v.transpose(1, 2))
            own_score = _diagonal(scores)
            own_dscore = x.sum_values(_diagonal(dscores)) * x.scale
            scores.tril_(-1)
            dq, dk, dg_inside = decay.scores_backward(scores, dscores.tril_(-1), q, k)
            dg += dg_inside
            dv = decay.value(x.unfold(dvalue)).baddbmm_(scores.transpose(1, 2), d).addcmul_(own_score, d)
            dq.add_(decay.query(dquery)).addcmul_(own_dscore, k)
            dk.add_(decay.key(dkey)).addcmul_(own_dscore, q)
        segment.put(gradients.q, dq)
        segment.put(gradients.k, dk)
        segment.put(gradients.v, dv)
        if gradients.g is not None and dg is not None:
            segment.put(gradients.g, dg)


def _diagonal(x: Tensor) -> Tensor:
    """A copy of the diagonal of [M, C, C], as a factor of rows [M, C, 1]."""
    return x.diagonal(dim1=1, dim2=2)[..., None].clone()


def _passages(read: Tensor, written: Tensor, past: Tensor) -> Tensor:
    """Gate gradients [M, C, ...] of what tokens from t on read, what tokens before t wrote, and what went past [M, ...]."""
    dg = read.flip(1).cumsum(1).flip(1)
    dg[:, 1:] += written[:, :-1].cumsum(1)
    return dg.add_(past.unsqueeze(1))
