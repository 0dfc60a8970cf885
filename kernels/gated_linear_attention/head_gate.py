"""One decay a head and step, or none: retention, and the state-space dual of Mamba-2 (arXiv:2405.21060, section 6).

With G the cumulative log decay inside a chunk (own token included) and S the state at its start,

    S' = exp(G_C) S + Σ_j k_j (exp(G_C - G_j) v_j)ᵀ
    o_i = scale · exp(G_i) Sᵀ q_i + scale · Σ_{j <= i} exp(G_i - G_j) (q_i·k_j) v_j

exp(G_i - G_j) does not depend on the key channel, so it can be taken apart: exp(G_i - G_C) goes with the output row and
exp(G_C - G_j), which the state wants anyway, with the value row. Then the chunk form is that of linear attention without a
decay, on the state exp(G_C) S, and the R value heads of a key head are columns of the same products. Where a chunk decays too
far for that (the factors would overflow), the matrix of exp(G_i - G_j) is formed for each head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gated_linear_attention.core import Gradients, passages, scan
from kernels.gated_linear_attention.operands import Operands, decay_factor
from kernels.gated_linear_attention.plan import Segment

# exp(-800) is zero in fp32 and fp64 alike; a finite floor keeps differences of sums finite where g = -inf.
FLOOR = -800.0
# The factors then lie within exp(±60): neither their products with data overflow nor do they near denormal numbers.
FACTORED_SPAN = 60.0


class NoGate:
    """Linear attention without a decay."""

    def __init__(self, x: Operands) -> None:
        self.x = x

    def forward(self, segment: Segment, state: Tensor, o: Tensor, start: Tensor | None) -> None:
        x = self.x
        q, k = x.fetch_qk(segment)
        value = segment.fetch(x.v, x.R, dtype=x.compute)
        if start is None:
            start = q.new_empty(q.shape[0], x.K, x.R * x.V)
        scan(segment, state, start, k.mT, value, None, decayed=False)
        out = torch.bmm(q, start).baddbmm_(torch.bmm(q, k.mT).tril_(), value)
        segment.put(o, out, x.R, x.scale)

    def backward(self, segment: Segment, do: Tensor, start: Tensor, dstate: Tensor, gradients: Gradients) -> None:
        x = self.x
        q, k = x.fetch_qk(segment)
        value, seen = segment.fetch(x.v, x.R, dtype=x.compute), segment.fetch(do, x.R, x.scale, x.compute)
        ends = torch.empty_like(start)
        scan(segment, dstate, ends, q.mT, seen, None, decayed=False, backwards=True)
        inside, dinside = torch.bmm(q, k.mT).tril_(), torch.bmm(seen, value.mT).tril_()
        segment.put(gradients.q, torch.bmm(seen, start.mT).baddbmm_(dinside, k))
        segment.put(gradients.k, torch.bmm(value, ends.mT).baddbmm_(dinside.mT, q))
        segment.put(gradients.v, torch.bmm(k, ends).baddbmm_(inside.mT, seen), x.R)

    def finish(self, gradients: Gradients) -> None:
        pass


class HeadGate:
    """rows, with the scale: factor of output rows; columns: of value rows; both [M H, C, R]. total [M H, 1, R V or 1].

    Their exponents are summed in fp64 (they are small): in fp32 one strong reset would blur all later differences in its
    chunk. factored: for each chunk, whether its segment's rows are exp(G_i - G_C) or exp(G_i).
    """

    def __init__(self, x: Operands) -> None:
        assert x.g is not None
        self.x = x
        C = x.plan.C
        padded = torch.cat([x.g, x.g.new_zeros(1, x.g.shape[1])])  # the last row is read by slots without a token
        g = padded[x.plan.slots].unflatten(2, (x.H, x.R)).transpose(1, 2).to(torch.float64)  # [M, H, C, R]
        G = g.clamp(min=FLOOR).cumsum(2)
        end = G[:, :, -1:]
        least = end.amin((1, 2, 3)).tolist()
        segments = x.plan.segments(x.size)
        fits = [min(least[s.first : s.last]) >= -FACTORED_SPAN for s in segments]
        self.factored = {s.first: fit for s, fit in zip(segments, fits)}
        self.G = None if all(fits) else G.flatten(0, 1)
        taken = torch.tensor([fit for s, fit in zip(segments, fits) for _ in range(s.last - s.first)], device=G.device)
        exponents = G - torch.where(taken.view(-1, 1, 1, 1), end, 0.0)
        self.rows = decay_factor(exponents, x.wide).mul_(x.scale).to(x.compute).view(-1, C, x.R)
        self.columns = decay_factor(end - G, x.wide).to(x.compute).view(-1, C, x.R)
        total = end.exp().to(x.wide).view(-1, 1, x.R)
        self.total = total.repeat_interleave(x.V, 2) if x.R > 1 else total
        # Of the gate's gradient, by token: what is read from earlier chunks, written for later ones, passed on inside.
        self.passed: tuple[Tensor, Tensor, Tensor] | None = None
        self.past = total.new_empty(0)

    def forward(self, segment: Segment, state: Tensor, o: Tensor, start: Tensor | None) -> None:
        x, here, factored = self.x, segment.rows(self.x.H), self.factored[segment.first]
        q, k = x.fetch_qk(segment)
        value = segment.fetch(x.v, x.R, self.columns[here], x.compute)
        if start is None:
            start = q.new_empty(q.shape[0], x.K, x.R * x.V)
        scan(segment, state, start, k.mT, value, self.total[here], decayed=factored)
        out, products = torch.bmm(q, start), torch.bmm(q, k.mT)
        if factored:
            segment.put(o, out.baddbmm_(products.tril_(), value), x.R, self.rows[here])
        else:
            scores = (products[:, None] * self._inner(here)).flatten(0, 1)
            inside = torch.bmm(scores, segment.fetch(x.v, dtype=x.compute))
            segment.put(o, self._add_by_head_(inside, out, self.rows[here]))

    def backward(self, segment: Segment, do: Tensor, start: Tensor, dstate: Tensor, gradients: Gradients) -> None:
        x, here, factored = self.x, segment.rows(self.x.H), self.factored[segment.first]
        q, k = x.fetch_qk(segment)
        rows, columns, total = self.rows[here], self.columns[here], self.total[here]
        value, seen = segment.fetch(x.v, x.R, columns, x.compute), segment.fetch(do, x.R, rows, x.compute)
        ends = torch.empty_like(start)
        scan(segment, dstate, ends, q.mT, seen, total, decayed=factored, backwards=True)
        dv, dk = torch.bmm(k, ends), torch.bmm(value, ends.mT)
        by_head = [t.unflatten(2, (x.R, x.V)).unbind(2) for t in (seen, value, start)]
        dqs = q.new_empty(x.R, *q.shape)
        for dq, d, _, s in zip(dqs, *by_head):
            torch.bmm(d, s.mT, out=dq)
        read, written, inside = self._passed(here)
        torch.sum(dqs * q, -1, dtype=x.wide, out=read)
        torch.sum((value * dv).unflatten(2, (x.R, x.V)), -1, dtype=x.wide, out=written.permute(1, 2, 0))
        past = (start * ends).mul_(total) if not factored else start * ends
        self.past[here] = past.unflatten(2, (x.R, x.V)).sum((1, 3), dtype=x.wide)

        # Inside the chunk.
        scores = torch.bmm(q, k.mT)
        if factored:
            scores.tril_()
            dscores = scores.new_empty(x.R, *scores.shape)
            for out, d, v, _ in zip(dscores, *by_head):
                torch.bmm(d, v.mT, out=out)
            inside.copy_(_across(dscores * scores, x.wide))
            dscores = _sum(dscores, 0).tril_()
            segment.put(gradients.v, dv.baddbmm_(scores.mT, seen), x.R, columns)
        else:
            v, d = segment.fetch(x.v, dtype=x.compute), segment.fetch(do, dtype=x.compute)
            inner = self._inner(here)
            scores = scores[:, None] * inner
            dscores = torch.bmm(d, v.mT).view(scores.shape)
            inside.copy_(_across(scores * dscores, x.wide).transpose(0, 1))
            dscores = _sum(dscores.mul_(inner), 1)
            segment.put(gradients.v, self._add_by_head_(torch.bmm(scores.flatten(0, 1).mT, d), dv, columns))
        segment.put(gradients.q, _sum(dqs, 0).baddbmm_(dscores, k))
        segment.put(gradients.k, dk.baddbmm_(dscores.mT, q))

    def finish(self, gradients: Gradients) -> None:
        x = self.x
        assert gradients.g is not None and self.passed is not None
        read, written, inside = (t.permute(1, 2, 0) for t in self.passed)
        dg = passages(read, written, self.past).add_(inside)
        dg = dg.view(-1, x.H, x.plan.C, x.R).transpose(1, 2).reshape(-1, x.H * x.R)
        gradients.g.index_copy_(0, x.plan.slots.flatten(), dg.to(gradients.g.dtype))

    def _passed(self, here: slice) -> list[Tensor]:
        """Three tables [R, m H, C], to be filled."""
        if self.passed is None:
            shape = (self.x.R, *self.rows.shape[:2])
            self.passed = tuple(self.total.new_empty(shape) for _ in range(3))
            self.past = self.total.new_empty(shape[1], self.x.R)
        return [t[:, here] for t in self.passed]

    def _inner(self, here: slice) -> Tensor:
        """scale · exp(G_i - G_j), zero above the diagonal: [m H, R, C, C]."""
        assert self.G is not None
        x, G = self.x, self.G.view(-1, self.x.plan.C, self.x.R)[here].transpose(1, 2)
        future = torch.ones(x.plan.C, x.plan.C, dtype=torch.bool, device=G.device).triu_(1)
        # The exponent is masked, not the exponential: above the diagonal it is positive and may overflow.
        exponents = (G[..., :, None] - G[..., None, :]).to(x.wide).masked_fill_(future, -torch.inf)
        return decay_factor(exponents, x.wide).mul_(x.scale).to(x.compute)

    def _add_by_head_(self, out: Tensor, x: Tensor, factor: Tensor) -> Tensor:
        """Adds x [m H, C, R V] times factor [m H, C, R] to out [m H R, C, V]."""
        by_head = x.unflatten(2, (self.x.R, self.x.V)).transpose(1, 2)
        out.view(by_head.shape).addcmul_(by_head, factor.transpose(1, 2)[..., None])
        return out


def _sum(x: Tensor, dim: int) -> Tensor:
    return x.squeeze(dim) if x.shape[dim] == 1 else x.sum(dim)


def _across(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """For each t the sum of weight [..., C, C] over rows from t on and columns before t: [..., C]."""
    flat = weight.to(dtype).flatten(0, -3)
    from_t_on = torch.ones_like(flat[0]).triu_().expand_as(flat)
    return torch.bmm(from_t_on, flat).tril_(-1).sum(-1).view(weight.shape[:-1])
