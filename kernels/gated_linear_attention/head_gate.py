"""One decay a head and step, or none: retention, and the state-space dual of Mamba-2 (arXiv:2405.21060, section 6).

exp(G_i - G_j) does not depend on the key channel, so it can be taken apart: exp(G_i - m) goes with the output row and
exp(m - G_j) with the value row, m half of the chunk's decay. Then the chunk form is that of linear attention without a decay,
and the R value heads of a key head are columns of the same products. Where a chunk decays too far for that (the factors
would overflow), the matrix of exp(G_i - G_j) is formed for each head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gated_linear_attention.operands import Operands, decay_factor
from kernels.gated_linear_attention.plan import Segment

# exp(-800) is zero in fp32 and fp64 alike; a finite floor keeps differences of sums finite where g = -inf.
FLOOR = -800.0
# The factors then lie within exp(±35) and their products within exp(±70): neither near overflow nor near denormal numbers.
FACTORED_SPAN = 70.0


@dataclass
class HeadDecay:
    """rows, with the scale: factor of output rows; columns: of value rows; both [m H R, C, 1], or None without a gate.

    inner: scale · exp(G_i - G_j) [m H R, C, C] where the decay is not factored.
    """

    R: int
    scale: float
    rows: Tensor | None = None
    columns: Tensor | None = None
    half: Tensor | None = None
    total: Tensor | None = None
    inner: Tensor | None = None

    @property
    def factored(self) -> bool:
        return self.inner is None

    def query(self, x: Tensor) -> Tensor:
        return x

    def key(self, x: Tensor) -> Tensor:
        return x

    def value(self, x: Tensor) -> Tensor:
        return x if self.columns is None else x * self.columns

    def output(self, x: Tensor) -> Tensor:
        return x * (self.scale if self.rows is None else self.rows)

    def _weigh(self, scores: Tensor, R: int) -> Tensor:
        assert self.inner is not None
        C = scores.shape[1]
        return (scores[:, None] * self.inner.view(-1, R, C, C)).view(-1, C, C)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return self._weigh(torch.bmm(q, k.transpose(1, 2)), self.R)

    def scores_backward(self, scores: Tensor, dscores: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plain = self._weigh(dscores, 1)
        if self.R > 1:
            plain = plain.view(-1, self.R, *plain.shape[1:]).sum(1)
        dg = self._across(scores, dscores)
        return torch.bmm(plain, k), torch.bmm(plain.transpose(1, 2), q), dg

    def gradient_inside(
        self, scores: Tensor, dscores: Tensor, query: Tensor, dquery: Tensor, key: Tensor, dkey: Tensor
    ) -> Tensor:
        return self._across(scores, dscores)

    def _across(self, scores: Tensor, dscores: Tensor) -> Tensor:
        """For each t the sum of scores · dscores over queries from t on and keys before t: [m H R, C]."""
        assert self.total is not None
        weight = scores.to(self.total.dtype) * dscores.to(self.total.dtype)
        from_t_on = torch.ones_like(weight[0]).triu_()
        return torch.matmul(from_t_on, weight).tril_(-1).sum(-1)

    @property
    def own_score(self) -> float:
        return self.scale

    @property
    def own_dscore(self) -> float:
        return 1.0  # the factors of a row and its own column leave the scale, and only that

    def per_gate(self, product: Tensor) -> Tensor:
        assert self.total is not None
        return product.sum(-1, dtype=self.total.dtype)

    def past(self, product: Tensor) -> Tensor:
        assert self.total is not None
        sums = product.sum((2, 4), dtype=self.total.dtype)  # [m, H, R]; half² is the total
        if self.half is None:
            sums *= self.total[:, :, 0, :, 0]
        return sums.flatten()


def no_gate(x: Operands, segment: Segment) -> HeadDecay:
    return HeadDecay(x.R, x.scale)


def head_gate(x: Operands, segment: Segment) -> HeadDecay:
    """G is summed in fp64 (it is small): in fp32 one strong reset would blur all later differences in its chunk."""
    assert x.g is not None
    G = segment.fetch(x.g, 1, torch.float64).clamp_(min=FLOOR).cumsum(-1)  # [m H R, C]
    C = G.shape[1]
    end = G[:, -1:]
    state = (-1, x.H, 1, x.R, 1)
    total = end.exp().to(x.wide).view(state)
    if float(end.amin()) >= -FACTORED_SPAN:
        middle = end / 2
        rows = ((G - middle).exp() * x.scale).to(x.compute)
        columns = (middle - G).exp().to(x.compute)
        half = middle.exp().to(x.wide).view(state)
        return HeadDecay(x.R, x.scale, rows[..., None], columns[..., None], half, total)
    future = torch.ones(C, C, dtype=torch.bool, device=G.device).triu_(1)
    # The exponent is masked, not the exponential: above the diagonal it is positive and may overflow.
    inner = (G[:, :, None] - G[:, None, :]).to(x.wide).masked_fill_(future, -torch.inf)
    inner = decay_factor(inner).mul_(x.scale).to(x.compute)
    columns = decay_factor((end - G).to(x.wide)).to(x.compute)
    rows = decay_factor(G.to(x.wide)).mul_(x.scale).to(x.compute)  # may reuse G, so it comes last
    return HeadDecay(x.R, x.scale, rows[..., None], columns[..., None], None, total, inner)
