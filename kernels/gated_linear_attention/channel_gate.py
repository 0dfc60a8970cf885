"""One decay a key channel and step: GLA (arXiv:2312.06635) and HGRN2 (arXiv:2404.07904).

exp(G_i - G_j) weighs every channel of q_i k_j on its own. As long as a span of tokens decays little it can be taken apart,
exp(G_i - m) to q and exp(m - G_j) to k with m half of the span's decay, and the span's scores are one matrix product. The
whole chunk is such a span for most trained gates. Where it is not, the chunk is halved until its blocks are (GLA's secondary
chunking, carried on down): the two halves of a block meet in a product of exp(sum from the border to i) q_i with
exp(sum from j to the border) k_j, both factors at most 1. Every such sum adds numbers of one sign and is a difference of
none, so that nothing overflows or cancels, also for g = -1e4 or -inf.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.gated_linear_attention.core import Gradients, passages, scan
from kernels.gated_linear_attention.operands import Operands, decay_factor
from kernels.gated_linear_attention.plan import Segment

# Factors within exp(±20), and sums whose last bit is worth 4e-6 of the result in fp32.
FACTORED_SPAN = 40.0


@dataclass
class ChannelDecay:
    """The decay of one segment of chunks. rows, columns [m H, C, K]: factors of q (with the scale) and of k; total [m H, K, 1].

    factored: rows are exp(G_i - G_C), to be read from a decayed state; else exp(G_i). Columns are exp(G_C - G_j).
    blocks: from small to large, (b, factor of q, factor of k): how blocks of b tokens meet their left neighbours.
    leaf: tokens in the blocks on the diagonal, whose factors are leaf_rows and leaf_columns (None: 1).
    """

    scale: float
    rows: Tensor
    columns: Tensor
    total: Tensor
    factored: bool = True
    leaf: int = 0
    leaf_rows: Tensor | None = None
    leaf_columns: Tensor | None = None
    blocks: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)

    # Scores of a chunk that is not factored are made of small products, where bf16 gains no time; and dq and dk must not be
    # rounded before the gate's gradient, a running sum of their difference, is taken.

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        wide = self.rows.dtype
        out = q.new_zeros(q.shape[0], q.shape[1], q.shape[1], dtype=wide)
        lq, lk = _cut(q.to(wide), self.leaf, self.leaf_rows), _cut(k.to(wide), self.leaf, self.leaf_columns)
        _diagonal(out, self.leaf).copy_((lq @ lk.transpose(-1, -2)).tril_())
        for b, rows, columns in self.blocks:
            right, left = _halves(q, b)[1] * rows, _halves(k, b)[0] * columns
            _diagonal(out, 2 * b)[..., b:, :b] = right @ left.transpose(-1, -2)
        return out.mul_(self.scale).to(q.dtype)

    def scores_backward(self, scores: Tensor, dscores: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = self.rows.dtype
        dscores = dscores.to(wide)
        lq, lk = _cut(q.to(wide), self.leaf, self.leaf_rows), _cut(k.to(wide), self.leaf, self.leaf_columns)
        d = _diagonal(dscores, self.leaf)
        dq, dk = d @ lk, d.transpose(-1, -2) @ lq
        dg = _later(lq * dq - lk * dk, 2).reshape(q.shape)
        if self.leaf_rows is not None and self.leaf_columns is not None:
            dq, dk = dq * self.leaf_rows, dk * self.leaf_columns
        dq, dk = dq.reshape(q.shape), dk.reshape(k.shape)
        for b, rows, columns in self.blocks:
            right, left = _halves(q, b)[1] * rows, _halves(k, b)[0] * columns
            d = _diagonal(dscores, 2 * b)[..., b:, :b].contiguous()
            dright, dleft = d @ left, d.transpose(-1, -2) @ right
            # All that passes between the halves crosses their border: what is read from t on, what was written before t.
            _halves(dg, b)[1].add_(_later(right * dright, 2))
            _halves(dg, b)[0][:, :, 1:].add_((left * dleft)[:, :, :-1].cumsum(2))
            _halves(dq, b)[1].addcmul_(dright, rows)
            _halves(dk, b)[0].addcmul_(dleft, columns)
        return dq.mul_(self.scale), dk.mul_(self.scale), dg.mul_(self.scale)


def _later(x: Tensor, dim: int) -> Tensor:
    """The sum of x from each place of `dim` on."""
    return x.flip(dim).cumsum(dim).flip(dim)


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x times a factor in fp32, rounded once to x's dtype."""
    return (x.to(factor.dtype) * factor).to(x.dtype)


def _cut(x: Tensor, size: int, factor: Tensor | None) -> Tensor:
    """[M, C, K] -> [M, C / size, size, K], times factor."""
    blocks = x.unflatten(1, (-1, size))
    return blocks if factor is None else blocks * factor


def _halves(x: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """[M, C, K] -> the left and right halves of its blocks of 2 b tokens, views [M, C / 2b, b, K]."""
    pairs = x.unflatten(1, (-1, 2, b))
    return pairs[:, :, 0], pairs[:, :, 1]


def _diagonal(x: Tensor, size: int) -> Tensor:
    """View of the blocks of `size` on the diagonal of [M, C, C]: [M, C / size, size, size]."""
    n = x.shape[1] // size
    return x.view(-1, n, size, n, size).diagonal(dim1=1, dim2=3).movedim(-1, 1)


class ChannelGate:
    """One call's operands under a decay a channel; R = 1 here."""

    def __init__(self, x: Operands) -> None:
        self.x = x

    def forward(self, segment: Segment, state: Tensor, o: Tensor, start: Tensor | None) -> None:
        x = self.x
        q, k = x.fetch_qk(segment)
        v, decay = segment.fetch(x.v, dtype=x.compute), segment_decay(x, segment)
        query, key = _times(q, decay.rows), _times(k, decay.columns)
        if start is None:
            start = q.new_empty(q.shape[0], x.K, x.V)
        scan(segment, state, start, key.mT, v, decay.total, decayed=decay.factored)
        inside = torch.bmm(query, key.mT).tril_() if decay.factored else decay.scores(q, k)
        segment.put(o, torch.bmm(query, start).baddbmm_(inside, v))

    def backward(self, segment: Segment, do: Tensor, start: Tensor, dstate: Tensor, gradients: Gradients) -> None:
        """A token's score for itself, which passes no decay, is kept apart: in the gate's gradient it would leave noise."""
        x = self.x
        assert gradients.g is not None
        q, k = x.fetch_qk(segment)
        v, d = segment.fetch(x.v, dtype=x.compute), segment.fetch(do, dtype=x.compute)
        decay = segment_decay(x, segment)
        query, key = _times(q, decay.rows), _times(k, decay.columns)
        ends = torch.empty_like(start)
        scan(segment, dstate, ends, query.mT, d, decay.total, decayed=decay.factored, backwards=True)
        dquery, dkey, dv = torch.bmm(d, start.mT), torch.bmm(v, ends.mT), torch.bmm(key, ends)
        past = (start * ends).sum(-1, dtype=x.wide)
        if not decay.factored:
            past *= decay.total[..., 0]
        dg = passages((query * dquery).to(x.wide), (key * dkey).to(x.wide), past)

        dscores = torch.bmm(d, v.mT)
        own_dscore = _own(dscores) * x.scale
        dscores.tril_(-1)
        if decay.factored:
            scores = torch.bmm(query, key.mT)
            dquery_inside, dkey_inside = torch.bmm(dscores, key), torch.bmm(dscores.mT, query)
            difference = query.to(x.wide) * dquery_inside.to(x.wide)
            dg += _later(difference.addcmul_(key.to(x.wide), dkey_inside.to(x.wide), value=-1.0), 1)
            dq, dk = _times(dquery.add_(dquery_inside), decay.rows), _times(dkey.add_(dkey_inside), decay.columns)
        else:
            scores = decay.scores(q, k)
            dq, dk, dg_inside = decay.scores_backward(scores, dscores, q, k)
            dg += dg_inside
            dq.add_(_times(dquery, decay.rows))
            dk.add_(_times(dkey, decay.columns))
        own_score = _own(scores)
        dv.baddbmm_(scores.tril_(-1).mT, d).addcmul_(own_score, d)
        segment.put(gradients.q, dq.addcmul_(own_dscore, k))
        segment.put(gradients.k, dk.addcmul_(own_dscore, q))
        segment.put(gradients.v, dv)
        segment.put(gradients.g, dg)

    def finish(self, gradients: Gradients) -> None:
        pass


def _own(x: Tensor) -> Tensor:
    """A copy of the diagonal of [M, C, C], as a factor of rows [M, C, 1]."""
    return x.diagonal(dim1=1, dim2=2)[..., None].clone()


def segment_decay(x: Operands, segment: Segment) -> ChannelDecay:
    assert x.g is not None
    g = segment.fetch(x.g)  # [m H, C, K], in fp32 at least
    C = g.shape[1]
    G = g.cumsum(1)
    end = G[:, -1:]
    if float(end.amin()) >= -FACTORED_SPAN:
        rows = (G - end).exp_()
        columns = rows.reciprocal()
        return ChannelDecay(x.scale, rows.mul_(x.scale), columns, end.exp().mT)
    leaf = C // 2
    while leaf > 1 and float(g.unflatten(1, (-1, leaf)).sum(2).amin()) < -FACTORED_SPAN:
        leaf //= 2
    blocks = g.unflatten(1, (-1, leaf))
    until = blocks.cumsum(2)  # from the block's start to i, i included
    after = (
        torch.cat([blocks[:, :, 1:], torch.zeros_like(blocks[:, :, :1])], 2).flip(2).cumsum(2).flip(2)
    )  # from j, not included
    decay = ChannelDecay(x.scale, G, G, G, factored=False, leaf=leaf)
    if leaf > 1:
        middle = until[:, :, -1:] / 2
        decay.leaf_rows = (until - middle).exp()
        decay.leaf_columns = (middle - until).exp()
    b = leaf
    while b < C:
        until, after = until.unflatten(1, (-1, 2)), after.unflatten(1, (-1, 2))
        decay.blocks.append(
            (b, decay_factor(until[:, :, 1].clone(), x.wide), decay_factor(after[:, :, 0].clone(), x.wide))
        )
        sums = until[:, :, :, -1:]
        until = torch.cat([until[:, :, 0], until[:, :, 1] + sums[:, :, 0]], 2)
        after = torch.cat([after[:, :, 0] + sums[:, :, 1], after[:, :, 1]], 2)
        b *= 2
    until, after = until.flatten(1, 2), after.flatten(1, 2)
    decay.total = until[:, -1:].exp().mT
    decay.rows = decay_factor(until, x.wide).mul_(x.scale)
    decay.columns = decay_factor(after, x.wide)
    return decay
