"""Routing in Triton: scores, groups, the choice and its weights in one kernel, rows in registers; one kernel backward.

Kept for the backward are the logits and the indices. NaN is preferred to everything, as by torch's topk, so indices stay valid.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.architecture import architecture
from kernels.experts.routing import SMALL, Rule
from kernels.tuning import Use, parameters

# ELEMENTS: of a tile of rows times experts.
DEFAULTS: dict[str, dict[str, dict[str, int]]] = {
    "experts_route": {"generic": {"ELEMENTS": 1024, "num_warps": 4, "num_stages": 1}},
}
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "experts_route": [{"ELEMENTS": n, "num_warps": w} for n in (512, 1024, 2048) for w in (1, 2, 4)],
}


@triton.jit
def _scores(logits, n, N, E: tl.constexpr, WIDTH: tl.constexpr, SOFTMAX: tl.constexpr):
    """Scores [ROWS, WIDTH] of tokens n, 0 past the last expert."""
    e = tl.arange(0, WIDTH)
    there = (n < N)[:, None] & (e < E)[None, :]
    z = tl.load(logits + n.to(tl.int64)[:, None] * E + e[None, :], mask=there, other=-float("inf")).to(tl.float32)
    if SOFTMAX:
        top = tl.max(z, axis=1)
        top = tl.where(n < N, top, 0.0)
        p = tl.exp(z - top[:, None])
        total = tl.where(n < N, tl.sum(p, axis=1), 1.0)
        s = p / total[:, None]
    else:
        s = tl.sigmoid(z)
    return s


@triton.jit(do_not_specialize=["N", "scale"])
def route_kernel(
    logits, bias, indices, weights, N, scale, small,
    E: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, KS: tl.constexpr, ROWS: tl.constexpr, SOFTMAX: tl.constexpr,
    BIAS: tl.constexpr, NORMALIZE: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
):  # fmt: skip
    """indices, weights [N, K] of logits [N, E]. Grid: tiles of rows."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, WIDTH)
    s = _scores(logits, n, N, E, WIDTH, SOFTMAX)
    wish = s
    if BIAS:
        wish += tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    wish = tl.where(wish == wish, wish, float("inf"))
    wish = tl.where((e < E)[None, :], wish, -float("inf"))
    if GROUPS > 1:
        EACH: tl.constexpr = WIDTH // GROUPS
        grouped = tl.reshape(wish, ROWS, GROUPS, EACH)
        member = tl.arange(0, EACH)[None, None, :]
        best = tl.max(grouped, axis=2)
        first = tl.min(tl.where(grouped == best[:, :, None], member, EACH), axis=2)
        best += tl.max(tl.where(member == first[:, :, None], -float("inf"), grouped), axis=2)
        group = tl.arange(0, GROUPS)[None, :]
        closed = tl.full([ROWS, GROUPS], 1, dtype=tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            top = tl.max(tl.where(closed == 1, best, -float("inf")), axis=1)
            found = tl.min(tl.where((closed == 1) & (best == top[:, None]), group, GROUPS), axis=1)
            closed = tl.where(group == found[:, None], 0, closed)
        wish = tl.reshape(tl.where(closed[:, :, None] == 1, -float("inf"), grouped), ROWS, WIDTH)
    j = tl.arange(0, KS)
    experts = tl.zeros([ROWS, KS], dtype=tl.int32)
    values = tl.zeros([ROWS, KS], dtype=tl.float32)
    for i in tl.static_range(K):
        top = tl.max(wish, axis=1)
        found = tl.min(tl.where(wish == top[:, None], e[None, :], WIDTH), axis=1)
        hit = e[None, :] == found[:, None]
        here = (j == i)[None, :]
        experts = tl.where(here, found[:, None], experts)
        values = tl.where(here, tl.sum(tl.where(hit, s, 0.0), axis=1)[:, None], values)
        wish = tl.where(hit, -float("inf"), wish)
    if NORMALIZE:
        values = values / (tl.sum(values, axis=1) + small)[:, None]
    at = n.to(tl.int64)[:, None] * K + j[None, :]
    mask = (n < N)[:, None] & (j < K)[None, :]
    tl.store(indices + at, tl.minimum(experts, E - 1).to(tl.int64), mask=mask)
    tl.store(weights + at, (values * scale).to(weights.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "scale"])
def route_backward_kernel(
    logits, indices, upstream, d_logits, N, scale, small,
    E: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """d_logits [N, E] of upstream [N, K]. Grid: tiles of rows."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, WIDTH)
    s = _scores(logits, n, N, E, WIDTH, SOFTMAX)
    rows = n < N
    d = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    mine = tl.zeros([ROWS, WIDTH], dtype=tl.int32)
    for i in tl.static_range(K):
        found = tl.load(indices + n.to(tl.int64) * K + i, mask=rows, other=0).to(tl.int32)
        hit = e[None, :] == found[:, None]
        given = tl.load(upstream + n.to(tl.int64) * K + i, mask=rows, other=0.0).to(tl.float32)
        d += tl.where(hit, given[:, None] * scale, 0.0)
        mine = tl.where(hit, 1, mine)
    if NORMALIZE:
        total = (tl.sum(tl.where(mine == 1, s, 0.0), axis=1) + small)[:, None]
        d = tl.where(mine == 1, (d - tl.sum(d * s, axis=1)[:, None] / total) / total, 0.0)
    if SOFTMAX:
        d = s * (d - tl.sum(d * s, axis=1)[:, None])
    else:
        d = d * s * (1.0 - s)
    there = rows[:, None] & (e < E)[None, :]
    tl.store(d_logits + n.to(tl.int64)[:, None] * E + e[None, :], d.to(d_logits.dtype.element_ty), mask=there)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
        logits = logits.contiguous()
        N, E = logits.shape
        K = rule.top_k
        indices = torch.empty(N, K, dtype=torch.int64, device=logits.device)
        weights = torch.empty(N, K, dtype=logits.dtype, device=logits.device)
        if N:
            grid, tile, use = _launch(logits)
            route_kernel[grid](
                logits, bias, indices, weights, N, rule.scale, SMALL, E, **tile, K=K, KS=triton.next_power_of_2(K),
                SOFTMAX=rule.gate == "softmax", BIAS=bias is not None, NORMALIZE=rule.normalize, GROUPS=rule.groups,
                TOP_GROUPS=rule.top_groups, **use,
            )  # fmt: skip
        ctx.rule = rule
        ctx.save_for_backward(logits, indices)
        ctx.mark_non_differentiable(indices)
        return indices, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        logits, indices = ctx.saved_tensors
        rule = ctx.rule
        d_logits = torch.empty_like(logits)
        if d_logits.numel():
            grid, tile, use = _launch(logits)
            route_backward_kernel[grid](
                logits, indices, upstream.contiguous(), d_logits, logits.shape[0], rule.scale, SMALL, logits.shape[1],
                **tile, K=rule.top_k, SOFTMAX=rule.gate == "softmax", NORMALIZE=rule.normalize, **use,
            )  # fmt: skip
        return d_logits, None, None


def _launch(logits: Tensor) -> tuple[tuple[int], dict[str, int], Use]:
    """(grid, tile, launch options)."""
    N, E = logits.shape
    use = parameters("experts_route", architecture(logits.device), defaults=DEFAULTS, E=E)
    width = triton.next_power_of_2(E)
    rows = max(1, use.pop("ELEMENTS") // width)
    return (triton.cdiv(N, rows),), {"WIDTH": width, "ROWS": rows}, use


def route_triton(logits: Tensor, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """See `kernels.experts.routing.route`."""
    indices, weights = _Route.apply(logits, bias, rule)
    return indices, weights
