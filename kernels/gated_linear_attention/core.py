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

Gate = Callable[[Operands, Segment, bool], Decay]  # the last: whether the part inside the chunks will be asked for


def _advance(x: Operands, segment: Segment, written: Tensor, decay: Decay, state: Tensor) -> Tensor:
    """The scan over one segment: returns half S at the chunks' starts [m H, K, R V]; moves `state` on in place."""
    starts = torch.empty_like(written)
    starts_view, written_view = starts.view(x.state_shape), written.view(x.state_shape)
    for piece in segment.pieces:
        here, increment = state[piece.sequences], written_view[piece.chunks]
        if decay.half is None:
            starts_view[piece.chunks] = here
            if decay.total is not None:
                here *= decay.total[piece.chunks]
            here += increment
        else:
            half = decay.half[piece.chunks]
            torch.mul(here, half, out=starts_view[piece.chunks])
            assert decay.total is not None
            here.mul_(decay.total[piece.chunks]).addcmul_(increment, half)
    return starts


def forward(x: Operands, gate: Gate, state: Tensor, o: Tensor) -> None:
    """Writes o [(tokens + 1) * H * R, V] and moves `state` [N, H, K, R, V] (sorted) to the end of each sequence."""
    for segment in x.plan.segments(x.size):
        key_rows, value_rows = x.key_rows(segment), segment.rows(x.H * x.R)
        q, k = x.fetch(segment, x.q, key_rows), x.fetch(segment, x.k, key_rows)
        v = x.fetch(segment, x.v, value_rows)
        decay = gate(x, segment, True)
        query, key, value = decay.query(q), decay.key(k), x.fold(decay.value(v))
        starts = _advance(x, segment, torch.bmm(key.transpose(1, 2), value), decay, state)
        read = torch.bmm(query, starts)
        if decay.factored:
            inside = torch.bmm(query, key.transpose(1, 2)).tril_()
            out = decay.output(x.unfold(read.baddbmm_(inside, value)))
        else:
            out = decay.output(x.unfold(read)).baddbmm_(decay.scores(q, k), v)
        segment.put(o, value_rows, out)


def starts_of_chunks(x: Operands, gate: Gate, state: Tensor) -> Tensor:
    """half S at the start of every chunk [M H, K, R V], in the dtype of the products; `state` moves to the ends."""
    starts = torch.empty(x.plan.chunks * x.H, x.K, x.R * x.V, dtype=x.compute, device=x.q.device)
    for segment in x.plan.segments(x.size):
        decay = gate(x, segment, False)
        key = decay.key(x.fetch(segment, x.k, x.key_rows(segment)))
        value = x.fold(decay.value(x.fetch(segment, x.v, segment.rows(x.H * x.R))))
        written = torch.bmm(key.transpose(1, 2), value)
        starts[segment.first * x.H : segment.last * x.H] = _advance(x, segment, written, decay, state)
    return starts


@dataclass(frozen=True)
class Gradients:
    """Rows to be filled, one token longer than the operands': dq, dk [.., K] a state head; dv [.., V]; dg as g, or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None


def _retreat(
    x: Operands, segment: Segment, read: Tensor, decay: Decay, start: Tensor, dstate: Tensor, boundary: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The scan against time: the gradient of each chunk's W [m H, K, R V], and S·dS at each chunk's end.

    read: gradient of half S through the chunk's outputs. `dstate` and `boundary` (S·dS at the next chunk's start) move back.
    """
    ends = torch.empty_like(read)
    ends_view, read_view, start_view = (t.view(x.state_shape) for t in (ends, read, start))
    at_end = None if boundary is None else boundary.new_empty(segment.last - segment.first, *boundary.shape[1:])
    for piece in segment.pieces:
        here, arriving = dstate[piece.sequences], read_view[piece.chunks]
        if decay.half is None:
            ends_view[piece.chunks] = here
            if decay.total is not None:
                here *= decay.total[piece.chunks]
            here += arriving
        else:
            half = decay.half[piece.chunks]
            torch.mul(here, half, out=ends_view[piece.chunks])
            assert decay.total is not None
            here.mul_(decay.total[piece.chunks]).addcmul_(arriving, half)
        if at_end is not None and boundary is not None:
            at_end[piece.chunks] = boundary[piece.sequences]
            boundary[piece.sequences] = decay.at_boundary(start_view[piece.chunks], here, piece.chunks)
    return ends, at_end


def backward(
    x: Operands,
    gate: Gate,
    o: Tensor,
    do: Tensor,
    starts: Tensor,
    dstate: Tensor,
    boundary: Tensor | None,
    gradients: Gradients,
) -> None:
    """Fills `gradients`; dstate [N, H, K, R, V] (sorted) turns from the final states' gradient into the initial states'.

    o, do [tokens * H * R, V]; boundary: S·dS of the final states for the dims of the gate, None if there is no gate.
    The gate's gradient inside a chunk is sum_{i >= t} dG_i + S_end·dS_end.
    """
    for segment in x.plan.segments(x.size, reverse=True):
        key_rows, value_rows = x.key_rows(segment), segment.rows(x.H * x.R)
        q, k = x.fetch(segment, x.q, key_rows), x.fetch(segment, x.k, key_rows)
        v, d = x.fetch(segment, x.v, value_rows), x.fetch(segment, do, value_rows)
        decay = gate(x, segment, True)
        query, key, value, seen = decay.query(q), decay.key(k), x.fold(decay.value(v)), x.fold(decay.output(d))
        start = starts[segment.first * x.H : segment.last * x.H]
        read = torch.bmm(query.transpose(1, 2), seen)
        ends, at_end = _retreat(x, segment, read, decay, start, dstate, boundary)

        dquery = torch.bmm(seen, start.transpose(1, 2))
        dkey = torch.bmm(value, ends.transpose(1, 2))
        dvalue = torch.bmm(key, ends)
        if decay.factored:
            inside = torch.bmm(query, key.transpose(1, 2)).tril_()
            dvalue.baddbmm_(inside.transpose(1, 2), seen)
            dinside = torch.bmm(seen, value.transpose(1, 2)).tril_()
            dquery.baddbmm_(dinside, key)
            dkey.baddbmm_(dinside.transpose(1, 2), query)
            dq, dk, dv = decay.query(dquery), decay.key(dkey), decay.value(x.unfold(dvalue))
        else:
            dv = decay.value(x.unfold(dvalue)).baddbmm_(decay.scores(q, k).transpose(1, 2), d)
            dq, dk = decay.scores_backward(torch.bmm(d, v.transpose(1, 2)), q, k)
            dq += decay.query(dquery)
            dk += decay.key(dkey)
        segment.put(gradients.q, segment.rows(x.H), dq)
        segment.put(gradients.k, segment.rows(x.H), dk)
        segment.put(gradients.v, value_rows, dv)
        if at_end is not None and gradients.g is not None:
            out = segment.fetch(o, value_rows).flatten(0, 1)
            dG = decay.gate_gradient(q, dq, k, dk, out, d, v, dv)
            after = dG.flip(1).cumsum(1).flip(1)
            after += at_end.view(after.shape[0], 1, *after.shape[2:])
            segment.put(gradients.g, value_rows, after)
