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
    kept: Tensor,
    added: Tensor,
    decay: Decay,
    segment: Segment,
    state: Tensor,
    after: Callable[[int, Tensor], None] | None = None,
) -> None:
    """state <- total state + half added, chunk by chunk, and kept = half state before each.

    kept, added [m, H, K, R, V]; state [N, H, K, R, V], moved on in place. With `after` the chunks are met last to first,
    and after(index of the piece, state) is called behind each.
    """
    pieces = zip(
        segment.states(state),
        _by_piece(kept, segment),
        _by_piece(added, segment),
        _by_piece(decay.half, segment),
        _by_piece(decay.total, segment),
    )
    numbered = list(enumerate(pieces))
    for index, (here, before, increment, half, total) in numbered if after is None else reversed(numbered):
        assert before is not None and increment is not None
        if half is not None and total is not None:
            torch.mul(here, half, out=before)
            here.mul_(total).addcmul_(increment, half)
        else:
            before.copy_(here)
            if total is not None:
                here.mul_(total)
            here.add_(increment)
        if after is not None:
            after(index, here)


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


def backward(
    x: Operands,
    gate: Gate,
    do: Tensor,
    starts: Tensor,
    dstate: Tensor,
    boundary: Tensor | None,
    gradients: Gradients,
) -> None:
    """Fills `gradients`; dstate [N, H, K, R, V] (sorted) turns from the final states' gradient into the initial states'.

    do [tokens, H R, V]; starts as `forward` gave them.
    boundary: Σ S ⊙ dS of the final states over all but the dims of the gate, None if there is no gate. It is carried back:
    the gate's gradient inside a chunk is Σ_{i >= t} dG_i plus that sum at the chunk's end.
    """
    for segment in reversed(x.plan.segments(x.size)):
        q, k = _fetch_qk(x, segment)
        v, d = segment.fetch(x.v, 1, x.compute), segment.fetch(do, 1, x.compute)
        decay = gate(x, segment)
        query, key, value, seen = decay.query(q), decay.key(k), x.fold(decay.value(v)), x.fold(decay.output(d))
        start = starts[segment.first * x.H : segment.last * x.H]
        read = torch.bmm(query.transpose(1, 2), seen)  # gradient of half S through the chunk's outputs
        ends = torch.empty_like(read)  # gradient of W
        at_end = None
        carry: Callable[[int, Tensor], None] = _nothing
        if boundary is not None:
            at_end = boundary.new_empty(segment.last - segment.first, *boundary.shape[1:])
            carry = _carry_boundary(x, segment, decay, start.view(x.state_shape), boundary, at_end)
        _scan(ends.view(x.state_shape), read.view(x.state_shape), decay, segment, dstate, carry)

        # Through the state: what all earlier and later chunks contribute.
        dquery = torch.bmm(seen, start.transpose(1, 2))
        dkey = torch.bmm(value, ends.transpose(1, 2))
        dvalue = torch.bmm(key, ends)
        # Through the scores inside the chunk. A token's share in its own output passes no decay, so it stays out until the
        # gate's gradient is taken: as the largest term of q·dq and of k·dk it would cancel there, but its rounding would not.
        if decay.factored:
            inside = torch.bmm(query, key.transpose(1, 2))
            dinside = torch.bmm(seen, value.transpose(1, 2))
            own_score = x.of_values(_diagonal(inside)) * decay.own_score
            own_dscore = _diagonal(dinside) * decay.own_dscore
            inside.tril_(-1)
            dinside.tril_(-1)
            dv = decay.value(x.unfold(dvalue.baddbmm_(inside.transpose(1, 2), seen)))
            dq = decay.query(dquery.baddbmm_(dinside, key))
            dk = decay.key(dkey.baddbmm_(dinside.transpose(1, 2), query))
        else:
            inside, dinside = decay.scores(q, k), torch.bmm(d, v.transpose(1, 2))
            own_score = _diagonal(inside)
            own_dscore = x.sum_values(_diagonal(dinside)) * x.scale
            inside.tril_(-1)
            dv = decay.value(x.unfold(dvalue)).baddbmm_(inside.transpose(1, 2), d)
            dq, dk = decay.scores_backward(dinside.tril_(-1), q, k)
            dq += decay.query(dquery)
            dk += decay.key(dkey)
        if at_end is not None and gradients.g is not None:
            if x.R == 1:
                dG = decay.per_gate(_difference(q, dq, k, dk, x.wide))
            else:
                # dq and dk are sums over value heads here. For each of them q·dq = o·do and k·dk = v·dv.
                read_out = torch.bmm(query, start)
                if decay.factored:
                    out = decay.output(x.unfold(read_out.baddbmm_(inside, value)))
                else:
                    out = decay.output(x.unfold(read_out)).baddbmm_(inside, v)
                dG = decay.per_gate(_difference(out, d, v, dv, x.wide))
            after = dG.flip(1).cumsum(1).flip(1)
            after += at_end.view(after.shape[0], 1, *after.shape[2:])
            segment.put(gradients.g, after)
        segment.put(gradients.q, dq.addcmul_(own_dscore, k))
        segment.put(gradients.k, dk.addcmul_(own_dscore, q))
        segment.put(gradients.v, dv.addcmul_(own_score, d))


def _diagonal(x: Tensor) -> Tensor:
    """A copy of the diagonal of [M, C, C], as a factor of rows [M, C, 1]."""
    return x.diagonal(dim1=1, dim2=2)[..., None].clone()


def _difference(a: Tensor, da: Tensor, b: Tensor, db: Tensor, dtype: torch.dtype) -> Tensor:
    return (a.to(dtype) * da.to(dtype)).addcmul_(b.to(dtype), db.to(dtype), value=-1.0)


def _nothing(index: int, dstate: Tensor) -> None:
    pass


def _carry_boundary(
    x: Operands, segment: Segment, decay: Decay, start: Tensor, boundary: Tensor, at_end: Tensor
) -> Callable[[int, Tensor], None]:
    """For each piece: gives `at_end` its chunks' Σ S ⊙ dS, and moves `boundary` on to their starts."""
    carried, ends, starts = segment.states(boundary), _by_piece(at_end, segment), _by_piece(start, segment)
    halves = _by_piece(None if decay.half is None else decay.boundary(decay.half), segment)

    def carry(index: int, dstate: Tensor) -> None:
        end, start, half = ends[index], starts[index], halves[index]
        assert end is not None and start is not None
        end.copy_(carried[index])
        product = decay.boundary(start * dstate)
        carried[index].copy_(product if half is None else product / half)

    return carry
