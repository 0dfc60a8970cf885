"""The delta rule by chunks where a head has one decay, or none: the forward pass.

Notation of `chunked.py`. All is computed in the accumulation dtype; what is kept for the backward pass has the dtype of the
inputs. A step of the work is some chunks of some key heads, few enough to stay in the L2 cache: there an elementwise pass
takes a quarter of the time that it takes outside. Value heads of one key head follow each other and share what depends on
keys and queries alone. Decays and lengths that belong to a row are multiplied into the operands of a matrix product, so that
the scan over chunks is matrix products and little else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.delta_rule.chunked_gates import Gates, Pairs, Part, faint, gates, parts
from kernels.delta_rule.layout import ChunkLayout
from kernels.delta_rule.precision import accumulation_dtype


class Keys(NamedTuple):
    """Of the chunks of a slab for a group of key heads, M of them.

    X [M, 2, C, K]: queries (scaled) and keys, normalised where asked. lengths [M, 2, C, 1]: by what they were multiplied.
    raw [M, 2, C, C]: their products with the keys.
    """

    X: Tensor
    lengths: Tensor | None
    raw: Tensor


def key_side(q: Tensor, k: Tensor, part: Part, scale: float, normalize_qk: bool, dtype: torch.dtype) -> Keys:
    """q, k [tokens, H, K]."""
    heads, slab = part.heads, part.slab
    m, h, C, K = sum(slab.sizes), part.H, slab.C, q.shape[2]
    X = q.new_empty(m, h, 2, C, K, dtype=dtype)
    slab.pack(q[:, heads], X[:, :, 0])
    slab.pack(k[:, heads], X[:, :, 1])
    X = X.view(m * h, 2, C, K)
    lengths = None
    if normalize_qk:
        lengths = torch.linalg.vector_norm(X, dim=-1, keepdim=True).square_().add_(1e-6).rsqrt_()
        lengths[:, 0] *= scale
        X *= lengths
    else:
        X[:, 0] *= scale
    raw = torch.bmm(X.view(-1, 2 * C, K), X[:, 1].mT)
    return Keys(X, lengths, raw.view(-1, 2, C, C))


def states_by_part(states: Tensor, layout: ChunkLayout, H: int, dtype: torch.dtype) -> Tensor:
    """States [N, HV, K, V] by sequence -> [N times HV, K, V] where each part's are together, sequence by sequence."""
    states = layout.sort_states(states)
    out = states.new_empty(states.shape[0] * states.shape[1], *states.shape[2:], dtype=dtype)
    for part in _first_parts(layout, H, states.shape[1]):
        own = out[part.states].unflatten(0, (layout.N, -1))
        own.copy_(states[:, part.value_heads])
    return out


def states_by_sequence(states: Tensor, layout: ChunkLayout, H: int, HV: int) -> Tensor:
    """The reverse of `states_by_part`."""
    out = states.new_empty(layout.N, HV, *states.shape[1:])
    for part in _first_parts(layout, H, HV):
        out[:, part.value_heads] = states[part.states].unflatten(0, (layout.N, -1))
    return layout.unsort_states(out)


def _first_parts(layout: ChunkLayout, H: int, HV: int) -> list[Part]:
    return [part for group in parts(layout, H, HV) for part in group if part.index == 0]


def forward_heads(
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
    """q, k [tokens, H, K], v [tokens, HV, V], beta, g [tokens, HV].

    Returns o [tokens, HV, V], the final state [N, HV, K, V], and what the backward pass needs where recording, in the order of
    the parts and in the inputs' dtype where its range allows: e [M, C, V], (I + P)^-1 [M, C, C], and the states at the starts
    of chunks [M, K, V].
    """
    (H, K), (HV, V), C = q.shape[1:], v.shape[1:], layout.C
    dtype = accumulation_dtype(q.dtype)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    if initial_state is None:
        S = v.new_zeros(layout.N * HV, K, V, dtype=dtype)
    else:
        S = states_by_part(initial_state, layout, H, dtype)
    kept: tuple[Tensor, ...] = ()
    direct = False
    if recording:
        narrow = q.dtype if q.dtype == torch.bfloat16 else dtype
        direct, total = narrow == dtype, layout.chunks * HV
        kept = tuple(q.new_empty(total, *shape, dtype=narrow) for shape in ((C, V), (C, C), (K, V)))
    gate = gates(beta, g, layout, H, dtype)
    spaces: dict[int, Pairs] = {}
    for group in parts(layout, H, HV):
        keys = key_side(q, k, group[0], scale, normalize_qk, dtype)
        M, h = keys.X.shape[0], group[0].H
        if M not in spaces:
            spaces[M] = Pairs(M, C, S)
        for part in group:
            score = gate.pairs(part.rows, spaces[M]).mul(gate.beta[part.rows])[:, None] * keys.raw
            inverse = F.hardshrink(unit_lower_inverse(score[:, 1]), faint(dtype))
            values = S.new_empty(M, C, V)
            part.slab.pack(v[:, part.value_heads], values.view(-1, h, C, V))
            if direct:
                e, starts = kept[0][part.rows], kept[2][part.rows]
            else:
                e, starts = torch.empty_like(values), S.new_empty(M, K, V)
            out = _scan(S[part.states], keys.X, gate, part, values, inverse, e, starts)
            part.slab.unpack(out.baddbmm_(score[:, 0], e).view(-1, h, C, V), o[:, part.value_heads])
            if recording:
                kept[1][part.rows] = inverse
                if not direct:
                    kept[0][part.rows], kept[2][part.rows] = e, starts
    return o, states_by_sequence(S, layout, H, HV), kept


def _scan(
    S: Tensor, X: Tensor, gate: Gates, part: Part, values: Tensor, inverse: Tensor, e: Tensor, starts: Tensor
) -> Tensor:
    """Takes the states S through the slab, in place. Fills e and, with the states at the starts of chunks, starts.

    Returns what the queries read from S. Overwrites values.
    """
    read, write = operands(X, gate, part)
    out = torch.empty_like(values)
    whole = gate.whole[part.rows]
    split = [part.slab.split(x, part.H) for x in (read[:, 0], read[:, 1], write.mT, values, inverse, e, out, whole)]
    now = part.slab.split(starts, part.H)
    now[0].copy_(S[: now[0].shape[0]])
    for t, (queries, reads, writes, error, inverses, errors, outs, decay) in enumerate(zip(*split)):
        n, left = now[t].shape[0], now[t + 1].shape[0] if t + 1 < len(now) else 0
        torch.bmm(queries, now[t], out=outs)
        torch.bmm(inverses, error.baddbmm_(reads, now[t], alpha=-1.0), out=errors)
        after = now[t + 1] if left == n else S[:n]
        torch.mul(now[t], decay, out=after).baddbmm_(writes, errors)
        if 0 < left < n:  # the last sequences end here
            now[t + 1].copy_(S[:left])
    return out


def operands(X: Tensor, gate: Gates, part: Part) -> tuple[Tensor, Tensor]:
    """[M, 2, C, K] queries and keys decayed from the start of the chunk; [M, C, K] beta k decayed to its end."""
    return X * gate.read[part.rows], X[:, 1] * gate.write[part.rows]


def unit_lower_inverse(P: Tensor) -> Tensor:
    """(I + P)^-1 for strictly lower triangular P [M, C, C], by substitution; what P has elsewhere does not count.

    Products of powers, (I - P)(I + P^2)(I + P^4)..., cancel badly: for beta = 2 and equal keys P^8 has entries near 1e6
    already in a block of 16, which must sum to entries near 1.
    """
    identity = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device).expand_as(P)
    return torch.linalg.solve_triangular(P, identity, upper=False, unitriangular=True)
