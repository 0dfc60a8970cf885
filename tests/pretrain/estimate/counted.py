"""What torch counts of real passes, so that it can be held against our count.

Causal attention is told to torch's counter, which would count masked scores, too: a forward pass makes two products a pair of
tokens, a fused backward pass five, of which the first makes the scores again. Recurrences and short convolutions are replaced by
what computes nothing and passes gradients on: kernels work through them in other ways than their definitions, which are counted
by hand (by_hand).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernels.benching.contenders import forced
from pretrain.estimate.memory import outside
from pretrain.model.sequence import SequenceContext

aten = torch.ops.aten


def _pairs(q: Any, k: Any, causal: bool) -> int:
    batch, heads, length, _ = q
    assert not causal or length == k[2]
    return int(batch * heads * (length * (length + 1) // 2 if causal else length * k[2]))


def _forward(q: Any, k: Any, v: Any, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    return 2 * _pairs(q, k, causal) * (q[-1] + v[-1])


def _backward(dy: Any, q: Any, k: Any, v: Any, o: Any, sums: Any, dropout: float, causal: bool, **_: Any) -> int:
    return 2 * _pairs(q, k, causal) * (3 * q[-1] + 2 * v[-1])


def _addmm(total: Any, a: Any, b: Any, **_: Any) -> int:
    return int(2 * a[0] * a[1] * b[1])


def _baddbmm(total: Any, a: Any, b: Any, **_: Any) -> int:
    return int(2 * a[0] * a[1] * a[2] * b[2])


COUNTED: dict[Any, Callable[..., int]] = {
    aten.addmm_: _addmm,  # in place, which torch's counter does not know
    aten.baddbmm_: _baddbmm,
    aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=COUNTED)


def _joined(like: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    """Zeros like `like`, in a graph with all inputs."""
    rest = sum(x.float().sum() * 0.0 for x in inputs if isinstance(x, Tensor) and x.is_floating_point())
    return torch.zeros_like(like) + torch.as_tensor(rest).to(like.dtype)


class _Defined(torch.autograd.Function):
    """An operator by its definition, whose products are counted as those of its fast form are made: with gradients off in the
    forward pass, so that selective checkpointing keeps none of them. What the fast form makes once more in its backward pass is
    not counted."""

    @staticmethod
    def forward(ctx: Any, operator: Any, options: dict[str, Any], *inputs: Tensor) -> Any:
        ctx.save_for_backward(*inputs)
        ctx.operator, ctx.options = operator, options
        with forced("reference"):
            return operator(*inputs, **options)[:-1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]

        def graph() -> Any:
            with forced("reference"):
                return ctx.operator(*inputs, **ctx.options)[:-1]

        return None, None, *torch.autograd.grad(outside(graph), inputs, gradients)


@contextmanager
def still() -> Iterator[None]:
    """Within it, recurrences and short convolutions make no product."""

    def convolve(self: Any, x: Tensor, weight: Tensor, *others: Any, **_: Any) -> Tensor:
        return _joined(x, (x, weight, *others))

    def recur(self: Any, operator: Any, *inputs: Any, **_: Any) -> Tensor:
        return _joined(inputs[0] if operator.__name__ == "selective_scan" else inputs[2], inputs)

    def look_back(self: Any, operator: Any, x: Tensor, *parameters: Tensor, reach: int, **options: Any) -> Any:
        options = {name: value for name, value in options.items() if name not in ("cache", "name")}
        return _Defined.apply(operator, {"cu_seqlens": self.cu_seqlens, **options}, x, *parameters)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceContext, "convolve", convolve)
        patch.setattr(SequenceContext, "look_back", look_back)
        patch.setattr(SequenceContext, "recur", recur)
        yield


# FLOPs that torch's counter does not see, a token: taps of convolutions, and the recurrence as it is defined. By hand, from the
# sizes in tests/pretrain/families.py at width 32: (value heads, K, V) of the state, operations for each of its entries.
def _state(heads: int, K: int, V: int, an_entry: float) -> float:
    return heads * K * V * an_entry


BY_HAND: dict[str, float] = {
    "conv_attention": 2 * 3 * 96,
    "cca": 2 * 2 * (4 + 2) * 8,  # depthwise: two taps on the channels of queries and keys
    "linear_attention": _state(2, 16, 16, 4),
    "gla": _state(2, 8, 16, 5),
    "hgrn2": _state(2, 16, 16, 5),
    "retnet": _state(2, 16, 32, 5),
    "delta_net": _state(2, 16, 16, 6) + 2 * 4 * 96,
    "gated_delta_net": _state(2, 16, 16, 7) + 2 * 4 * (16 + 16 + 32),
    "kda": _state(2, 16, 16, 7) + 2 * 4 * 96,
    "kda_safe": _state(2, 16, 16, 7) + 2 * 4 * 96,
    # Mamba: 64 channels of 8 states each: dt A, decay, write and read; per channel dt x, D x and the gate.
    "mamba": 64 * (8 * 6 + 4) + 2 * 4 * 64,
    # Mamba-2: 64 channels of 16 states each: decay, write and read; per channel dt x and D x.
    "mamba2": 64 * (16 * 5 + 3) + 2 * 4 * (64 + 2 * 2 * 16),
}
