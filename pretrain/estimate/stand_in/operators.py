"""Operators that compute nothing and allocate what the real ones do: attention, norms, rotations, activations, convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.attention.chunked import attention as packed_attention
from kernels.cca.chunked import BLOCK_BYTES as CCA_BYTES
from kernels.experts.routing_chunked import route_chunked
from kernels.norm.chunked import BLOCK_ELEMENTS
from kernels.offline.choice import choosing
from kernels.rational.chunked import BLOCK_ELEMENTS as RATIONAL_ELEMENTS
from pretrain.estimate.kept import Like, chosen, stand
from pretrain.estimate.stand_in.notes import Notes, size


class Borders:
    """Of `count` sequences of one length, for what reads them on the host."""

    def __init__(self, length: int, count: int):
        self.values = [length * i for i in range(count + 1)]

    def tolist(self) -> list[int]:
        return self.values


def attend(
    notes: Notes, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, sequences: int
) -> Tensor:
    """Attention over packed sequences of one length."""
    B, T, H, _ = q.shape
    if not notes.gpu or q.dtype == torch.float32:
        options: Any = Borders(T // sequences, sequences)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        with torch.autocast("cpu", enabled=False):
            return packed_attention(
                q, k, v, scale=scale, causal=True, window=window, cu_seqlens=options, cu_seqlens_k=options
            )
    # The fused kernel for packed sequences keeps its inputs, its output, and the sums of the softmax in fp32.
    return stand(Like((B, T, H, v.shape[-1]), q.dtype), [q, k, v], [True] * 3, extra=4 * T * H, of_output=True)


def _norm(notes: Notes, x: Tensor, *others: Any, **options: Any) -> Tensor:
    tensors = [x, *(other for other in others if isinstance(other, Tensor))]
    rows = x.numel() // x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32).itemsize
    # On a CPU row blocks of a fixed size are widened (kernels/norm/chunked.py); a GPU's kernel keeps them in registers.
    block = 0 if notes.gpu else wide * min(x.numel(), BLOCK_ELEMENTS * torch.get_num_threads())
    scratch = (
        block * (1 + (x.dtype != torch.float32)),
        block * (2 + 2 * (x.dtype != torch.float32) + len(others) // 3),
    )
    return stand(Like(tuple(x.shape), x.dtype), tensors, [True] * len(tensors), rows * wide, scratch)


def _rational(notes: Notes, x: Tensor, *coefficients: Tensor) -> Tensor:
    """kernels/rational in its allocations."""
    scratch = (0, 0)  # on a GPU a few sums of each program
    if not notes.gpu:  # temporaries of a row block, one more for rows that are widened
        D, wide = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
        rows = min(x.numel() // D, max(1, RATIONAL_ELEMENTS * torch.get_num_threads() // D))
        each, widened = rows * D * wide.itemsize, x.dtype != wide
        scratch = ((2 + widened) * each, (5 + widened) * each)
    return stand(Like(tuple(x.shape), x.dtype), [x, *coefficients], [True] * (1 + len(coefficients)), scratch=scratch)


def _add_norm(notes: Notes, x: Tensor, residual: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _norm(notes, total, *others), total


def _rotary(x: Tensor, *angles: Any) -> Tensor:
    return stand(Like(tuple(x.shape), x.dtype), [x], [False])  # the angles, which all layers share, are counted once


def _swiglu(gate_up: Tensor) -> Tensor:
    *rows, width = gate_up.shape
    return stand(Like((*rows, width // 2), gate_up.dtype), [gate_up], [True])


def queries_and_keys(notes: Notes, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    """kernels/cca in its allocations."""
    depthwise, _, grouped, _, factor = parameters
    B, T, C = z.shape
    J, rows, d = grouped.shape
    HKV, W1, item = factor.numel(), rows // d, z.element_size()
    # Gradients are off inside the operator, whose backward makes the convolutions again.
    notes.multiply("cca.grouped", B * T, d, rows, J, kept=False)
    if notes.gpu:
        # Both convolutions as one; the gradients of what is normalised, and sums of each program.
        taps = 4 * J * d * d * (depthwise.shape[1] + W1 - 1)
        scratch = (2 * taps, size(z) + 5 * taps)
    else:
        block = min(B * T * C, CCA_BYTES * torch.get_num_threads() // 4)  # worked through in blocks of so many elements
        wide = torch.promote_types(z.dtype, torch.float32).itemsize
        low = item + wide if item != wide else 0  # products, and rows in fp32
        forward = block * (wide + W1 * item + low)
        scratch = (forward, forward + block * wide * (3 + (W1 if item == wide else 1)) + grouped.numel() * wide)
    q = stand(Like((B, T, J - HKV, d), z.dtype), (z, *parameters), [True] * 6, scratch=scratch)
    # Its gradient reaches z by the queries': there is one for both.
    return q, stand(Like((B, T, HKV, d), z.dtype), [factor], [True])


class _Form:
    def __init__(self, function: Callable[..., Tensor]):
        self.function = function

    def load(self) -> Callable[..., Tensor]:
        return self.function


@contextmanager
def operators(notes: Notes) -> Iterator[None]:
    """Within it, the operators that layers call by themselves compute nothing."""
    import pretrain.model.mixers.selective_attention as selective

    norm = partial(_norm, notes)
    forms: dict[str, Any] = {
        **dict.fromkeys(("rms_norm", "l2_norm", "gated_rms_norm"), norm),
        "add_rms_norm": partial(_add_norm, notes),
        "experts_routing": route_chunked,
        "rational": partial(_rational, notes),
        "rotary": _rotary,
        "swiglu": _swiglu,
    }

    def choice(real: Any, request: Any) -> Any:
        measured = chosen(real, request)
        if measured is not None:
            return measured
        if request.op not in forms:
            raise ValueError(f"the memory of {request.op} is not known where a layer calls it by itself")
        return _Form(forms[request.op])

    def selected(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, **_: Any) -> Tensor:
        return attend(notes, q, k, v, None, None, cu_seqlens.numel() - 1)

    real = selective.attention
    selective.attention = selected  # type: ignore[assignment]
    try:
        with choosing(choice):
            yield
    finally:
        selective.attention = real
