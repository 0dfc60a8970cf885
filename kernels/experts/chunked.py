"""The routed feed-forward in plain torch: choices sorted by expert, one pair of matrix products an expert.

The weights' gradient is a dot product of hidden vectors, so the experts' outputs need not be kept (the same rearrangement:
SonicMoE, 2512.14080). What is kept for the backward is x and the projections of the gate and up columns; gathers and
activations are done again.

Each expert's rows pass through the same few buffers, which stay in the cache and whose pages are mapped once: fresh memory for
each expert, or rows of all experts gathered at once, cost more than the elementwise arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from kernels.common import products
from kernels.common.rows import row_blocks
from kernels.experts.activations import ACTIVATIONS


def experts(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, scores: Tensor, *, activation: str) -> Tensor:
    """y [N, D]; see kernels.experts.experts."""
    y: Tensor = _Experts.apply(x, gate_up, down, indices, scores, activation)
    return y


@dataclass(frozen=True)
class _Plan:
    """Where each choice sits in the buffers sorted by expert.

    source: int64 [P], the choice (token * k + j) that a row holds; filling rows hold choice 0 with weight 0. token: int64 [P].
    position: int64 [N, k], the row that holds a choice. segments: (expert, begin, end) for experts with work.
    """

    source: Tensor
    token: Tensor
    position: Tensor
    segments: list[tuple[int, int, int]]

    @property
    def longest(self) -> int:
        return max((end - begin for _, begin, end in self.segments), default=0)

    def weights(self, scores: Tensor, dtype: torch.dtype) -> Tensor:
        """scores [N, k] -> [P, 1], zero in filling rows."""
        placed = torch.zeros(self.source.shape[0], 1, dtype=dtype, device=scores.device)
        placed[self.position.reshape(-1), 0] = scores.reshape(-1).to(dtype)
        return placed

    def combine(self, rows: Tensor, scores: Tensor | None = None) -> Tensor:
        """(Weighted) sum of the k rows of each token: [P, D] -> [N, D]. A gather: no atomics, a fixed order."""
        if scores is not None:
            scores = scores.to(rows.dtype)
        if self.position.shape[1] == 1:
            y = rows.index_select(0, self.position[:, 0])
            return y if scores is None else y.mul_(scores)
        # Gathers, weighs and sums in one pass, accumulating in fp32; measured 3 to 6 times faster than indexing and sum.
        return embedding_bag(self.position, rows, per_sample_weights=scores, mode="sum")


def alignment(x: Tensor) -> int:
    """Rows to which each expert's share is rounded up.

    On CPUs bf16 products go through oneDNN, and on some fp32 ones (kernels/common/products.py), which compiles a kernel for
    each new shape: about a millisecond and half a megabyte, again and again if every step brings other loads. Rounding makes
    the shapes few, and the products' inner loops whole. Elsewhere nothing is padded.
    """
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    onednn = narrow or (x.dtype == torch.float32 and products.in_use() == "onednn")
    return 64 if x.device.type == "cpu" and onednn else 1


def _room(x: Tensor, rows: int, width: int) -> Tensor:
    """Memory for [rows, width], taken in steps of a sixteenth.

    Loads change from step to step, and sizes with them: what one step frees would not quite fit the next, and fresh pages cost
    more than the products that fill them.
    """
    step = 1 << max(0, rows.bit_length() - 5)
    return x.new_empty(-(-rows // step) * step, width)[:rows]


def _plan(indices: Tensor, experts: int, align: int) -> _Plan:
    flat = indices.reshape(-1)
    order = torch.argsort(flat, stable=True)  # stable: a fixed order
    counts = torch.bincount(flat, minlength=experts)
    sizes = (counts + align - 1) // align * align
    ends = sizes.cumsum(0)
    sorted_experts = flat[order]
    shift = (ends - sizes) - (counts.cumsum(0) - counts)  # how far the filling pushes each expert's rows
    rows = torch.arange(flat.numel(), device=flat.device) + shift[sorted_experts]
    bounds = ends.tolist()
    source = torch.zeros(bounds[-1], dtype=torch.int64, device=flat.device)
    source[rows] = order
    position = torch.empty_like(order)
    position[order] = rows
    segments = [(e, begin, end) for e, (begin, end) in enumerate(zip([0, *bounds], bounds)) if end > begin]
    return _Plan(source, source // indices.shape[1], position.view_as(indices), segments)


class _Matrices:
    """Each expert's matrix in the dtype of the products, cast into one buffer where it is kept in another."""

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.weight = weight
        self.buffer = None if weight.dtype == dtype else weight.new_empty(weight.shape[1:], dtype=dtype)

    def __getitem__(self, expert: int) -> Tensor:
        return self.weight[expert] if self.buffer is None else self.buffer.copy_(self.weight[expert])

    def gradient(self, into: Tensor, a: Tensor, b: Tensor) -> None:
        """into = a @ b, rounded on the way to its operands' dtype. What [expert] returned is lost."""
        if self.buffer is None:
            torch.mm(a, b, out=into)
        else:
            into.copy_(torch.mm(a, b, out=self.buffer))


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, scores: Tensor, activation: str
    ) -> Tensor:
        E, F, D = down.shape
        act = ACTIVATIONS[activation].into
        gated = gate_up.shape[2] != F
        plan = _plan(indices, E, alignment(x))
        P = plan.source.shape[0]
        hidden, out = _room(x, P, gate_up.shape[2]), _room(x, P, D)
        rows, acted = _room(x, plan.longest, D), _room(x, plan.longest, F)
        ups, downs = _Matrices(gate_up, x.dtype), _Matrices(down, x.dtype)
        for e, a, b in plan.segments:
            n, here = b - a, hidden[a:b]
            torch.index_select(x, 0, plan.token[a:b], out=rows[:n])
            torch.mm(rows[:n], ups[e], out=here)
            for block in row_blocks(acted[:n]):
                act(here[block, :F], acted[block])
                if gated:
                    acted[block].mul_(here[block, F:])
            torch.mm(acted[:n], downs[e], out=out[a:b])
        ctx.save_for_backward(x, gate_up, down, scores, hidden)
        ctx.plan, ctx.activation = plan, activation
        return plan.combine(out, scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, scores, hidden = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            return _backward(dy, x, gate_up, down, scores, hidden, ctx.plan, ctx.activation, ctx.needs_input_grad)


def _backward(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    scores: Tensor,
    hidden: Tensor,
    plan: _Plan,
    activation: str,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    act = ACTIVATIONS[activation]
    E, F, D = down.shape
    gated = gate_up.shape[2] != F
    weight, P, longest = plan.weights(scores, x.dtype), plan.source.shape[0], plan.longest
    d_gate_up = torch.empty_like(gate_up) if wanted[1] else None
    d_down = torch.empty_like(down) if wanted[2] else None
    for e in set(range(E)) - {e for e, _, _ in plan.segments}:
        for gradient in (d_gate_up, d_down):
            if gradient is not None:
                gradient[e] = 0
    d_weight = torch.empty(P, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    d_rows = _room(x, P, D) if wanted[0] else None
    rows = _room(x, longest, D)
    acted, d_acted = (_room(x, longest, F) for _ in range(2))
    d_hidden = _room(x, longest, gate_up.shape[2])
    ups, downs = _Matrices(gate_up, x.dtype), _Matrices(down, x.dtype)
    for e, a, b in plan.segments:
        n, here, token = b - a, hidden[a:b], plan.token[a:b]
        torch.index_select(dy, 0, token, out=rows[:n])
        torch.mm(rows[:n], downs[e].T, out=d_acted[:n])
        for block in row_blocks(acted[:n]):
            gate, value, d = here[block, :F], acted[block], d_acted[block]
            to, w = d_hidden[block], weight[a:b][block]
            act.into(gate, value)
            if gated:
                up = here[block, F:]
                # Unweighted so far: its dot product with up is the weight's gradient.
                torch.mul(d, value, out=to[:, F:])
                torch.sum(torch.mul(to[:, F:], up, out=to[:, :F]), -1, dtype=d_weight.dtype, out=d_weight[a:b][block])
                to[:, F:].mul_(w)
                value.mul_(up)
                act.backward(d.mul_(w).mul_(up), gate, to[:, :F])
            else:
                torch.sum(torch.mul(d, value, out=to), -1, dtype=d_weight.dtype, out=d_weight[a:b][block])
                act.backward(d.mul_(w), gate, to)
            value.mul_(w)
        if d_down is not None:
            downs.gradient(d_down[e], acted[:n].T, rows[:n])
        if d_gate_up is not None:
            torch.index_select(x, 0, token, out=rows[:n])
            ups.gradient(d_gate_up[e], rows[:n].T, d_hidden[:n])
        if d_rows is not None:
            torch.mm(d_hidden[:n], ups[e].T, out=d_rows[a:b])
    dx = None if d_rows is None else plan.combine(d_rows)
    return dx, d_gate_up, d_down, None, d_weight[plan.position].to(scores.dtype), None
