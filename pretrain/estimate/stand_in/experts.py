"""Experts that compute nothing, alone, among expert-parallel ranks and cut over tensor-parallel ones.

Loads are balanced: every expert gets as many tokens as any other, every rank as many as it sends.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.experts.chunked import alignment
from parallel.expert.travel import combined, copies
from pretrain.estimate.parameters import Cutting
from pretrain.estimate.stand_in.collectives import Join, Return, Share, Travel
from pretrain.estimate.stand_in.notes import Notes


class Experts:
    """Stands for kernels.experts and for the dispatchers of parallel/expert/dispatch.py."""

    def __init__(self, notes: Notes, experts: int, cutting: Cutting):
        self.notes, self.experts, self.cutting = notes, experts, cutting

    def __call__(
        self, tokens: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, scores: Tensor, activation: str = "silu"
    ) -> Tensor:
        if self.cutting.ep == 1:
            return self._gathered(tokens, gate_up, down, indices, scores)
        notes, k = self.notes, indices.shape[1]
        order = torch.argsort(indices.reshape(-1), stable=True)
        position = torch.empty_like(order).view_as(indices)
        notes.send("ep", "all_to_all", "loads of experts", 8.0 * self.experts)
        rows = copies(tokens, order, position)
        weights = scores.reshape(-1).index_select(0, order)
        rows, weights = Travel.apply(notes, "ep", rows, weights)
        expert = torch.empty(rows.shape[0], 1, dtype=torch.int64)
        out = self._gathered(rows, gate_up, down, expert, weights[:, None])
        assert k >= 1
        return combined(Return.apply(notes, out), order, position)

    def _gathered(self, tokens: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, scores: Tensor) -> Tensor:
        tp = self.cutting.tp if self.cutting.expert_tensor else 1
        if tp == 1:
            return self._local(tokens, gate_up, down, indices, scores)
        notes = self.notes
        notes.send("tp", "all_gather", "numbers of tokens", 8.0 * tp)
        notes.send("tp", "all_gather", "choices of experts", 8.0 * tp * indices.numel())
        chosen = torch.empty(tp * indices.shape[0], indices.shape[1], dtype=torch.int64)
        every, weights = Join.apply(notes, tp, tokens, scores)
        out = self._local(every, gate_up, down, chosen, weights)
        return Share.apply(notes, tp, out, "experts' tokens")

    def _local(self, tokens: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, scores: Tensor) -> Tensor:
        E, F, D = down.shape
        choices, rows = indices.numel(), alignment(tokens) if not self.notes.gpu else 1
        held = -(-choices // E // rows) * rows * E if choices else 0
        held = max(held, choices)
        W = gate_up.shape[2]  # 2 F with gates
        self.notes.multiply("experts.gate_up", choices / E, W, D, E, kept=False)
        self.notes.multiply("experts.down", choices / E, D, F, E, kept=False)
        item = tokens.element_size()
        cast = 0 if gate_up.dtype == tokens.dtype else (W + F) * D * item
        if self.notes.gpu:  # hidden activations of all rows; all matrices in the tokens' precision
            extra = held * W * item + 4 * choices
            scratch = (held * F * item + E * cast, held * (W + F) * item + E * cast)
        else:  # kept are the projections, and who is where; one expert at a time passes through the other buffers
            extra = held * W * item + 8 * (2 * held + choices)
            # Loads are not even: the largest is taken for half as much again.
            share = min(held, 3 * held // (2 * E)) * item
            scratch = (share * (D + F) + cast, share * (D + W + 2 * F) + cast)
        y: Tensor = _Experts.apply(tokens, gate_up, down, scores, extra, held, scratch)
        return y


class _Experts(torch.autograd.Function):
    """kernels/experts in its allocations."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        scores: Tensor,
        extra: int,
        rows: int,
        scratch: tuple[int, int],
    ) -> Tensor:
        hidden = x.new_empty(extra, dtype=torch.uint8)
        out = x.new_empty(rows, x.shape[1])
        ctx.save_for_backward(x, gate_up, down, scores, hidden)
        ctx.rows, ctx.scratch = rows, scratch[1]
        x.new_empty(scratch[0], dtype=torch.uint8)
        y = torch.empty_like(x)
        del out
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, gate_up, down, scores, _ = ctx.saved_tensors
        rows = x.new_empty(ctx.rows, x.shape[1])
        gradients = torch.empty_like(gate_up), torch.empty_like(down)
        scratch = x.new_empty(ctx.scratch, dtype=torch.uint8)
        dx = torch.empty_like(x)
        del rows, scratch
        return dx, *gradients, torch.empty_like(scores), None, None, None
