"""What a sublayer needs to know about the rows it is given, and everything that moves along them.

Sublayers call these methods for whatever crosses from one token to another. Here they are plain calls of the kernels, with
a cache while generating. Where a row is cut over several ranks, `parallel/context` supplies an object with the same methods,
and no sublayer knows of it. torch.compile leaves them as they are (`opaque`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels import attention, cca, delta_rule, gated_linear_attention, selective_scan, short_convolution
from kernels.cca import cca_step
from kernels.common.opaque import opaque
from kernels.delta_rule import delta_rule_step
from kernels.gated_linear_attention import gated_linear_attention_step
from kernels.short_conv import short_convolution_step
from kernels.state_space import selective_scan_step

Cache = dict[str, Any] | None
Operator = Callable[..., tuple[Tensor, Tensor | None]]

# What each operator does for a single token that continues a state: generation would else pay for a chunk's set-up.
STEPS: dict[Callable[..., Any], Callable[..., tuple[Tensor, ...]]] = {
    cca: cca_step,
    delta_rule: delta_rule_step,
    gated_linear_attention: gated_linear_attention_step,
    selective_scan: selective_scan_step,
}


@dataclass
class SequenceContext:
    """Borders and positions of one forward pass, shared by all layers.

    cu_seqlens: int32 [N+1], borders of packed sequences in the single row (B = 1), or None when each row is one sequence.
    positions: int64 [B, T], the position of each token within its own sequence.
    """

    positions: Tensor
    cu_seqlens: Tensor | None = None
    _rotary: dict[tuple[int, float], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, tokens: Tensor, cu_seqlens: Tensor | None, offset: int = 0) -> SequenceContext:
        """tokens [B, T]; offset: how many tokens of each row the caches already hold."""
        B, T = tokens.shape
        positions = torch.arange(offset, offset + T, device=tokens.device)
        if cu_seqlens is None:
            return cls(positions.expand(B, T))
        if B != 1:
            raise ValueError(f"cu_seqlens describes one packed row, but tokens has {B} rows; flatten them to [1, B*T]")
        if offset:
            raise ValueError("cu_seqlens cannot be combined with a cache that already holds tokens")
        starts = cu_seqlens[:-1].long()
        lengths = cu_seqlens[1:].long() - starts
        return cls((positions - torch.repeat_interleave(starts, lengths, output_size=T))[None], cu_seqlens)

    @opaque
    def rotary(self, dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """(cos, sin), each fp32 [B, T, 1, dim / 2], computed once per forward pass for all layers that agree on them."""
        key = (dim, theta)
        if key not in self._rotary:
            exponent = torch.arange(0, dim, 2, device=self.positions.device, dtype=torch.float32) / dim
            angles = self.positions[..., None].float() * (1.0 / theta**exponent)
            self._rotary[key] = (angles.cos()[:, :, None], angles.sin()[:, :, None])
        return self._rotary[key]

    @opaque
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        cache: Cache = None,
    ) -> Tensor:
        """Causal attention of q [B, T, H, K] over k [B, S, HKV, K] and v [B, S, HKV, V], and what the cache holds before them.

        -> [B, T, H, V]. Queries are the last T of the keys' positions. window: keys that a query sees, itself included.
        """
        if cache is not None:
            # Of packed prompts all is kept: where each one's window begins is known when they part.
            k, v = _remember(cache, k, v, None if self.cu_seqlens is not None else window)
        return attention(q, k, v, scale=scale, window=window, cu_seqlens=self.cu_seqlens)

    def extend(self, x: Tensor, cache: Cache, name: str) -> Tensor:
        """x [B, T, ...] with what cache[name] holds of the tokens before it, [B, S, ...]; remembered there. name: of BY_TOKEN."""
        if cache is None:
            return x
        cache[name] = _after_held(cache, name, x)
        return cache[name]

    @opaque
    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = "silu", cache: Cache = None
    ) -> Tensor:
        """The short causal convolution of x [B, T, C] by weight [C, W], continued from cache["conv"] and remembered there."""
        if cache is not None and "conv" in cache and x.shape[1] == 1:
            token, cache["conv"] = short_convolution_step(x[:, 0], cache["conv"], weight, bias, activation)
            return token[:, None]
        y, tail = short_convolution(
            x,
            weight,
            bias,
            activation=activation,
            initial_state=None if cache is None else cache.get("conv"),
            output_final_state=cache is not None,
            cu_seqlens=self.cu_seqlens,
        )
        if cache is not None:
            cache["conv"] = tail
        return y

    @opaque
    def recur(self, operator: Operator, *inputs: Tensor | None, cache: Cache = None, **options: Any) -> Tensor:
        """A recurrent operator of `kernels`, continued from cache["memory"] and remembered there.

        inputs: the operator's own, in order; those with three or more dims are [B, T, ...], the others parameters.
        """
        if cache is not None and "memory" in cache and inputs[0] is not None and inputs[0].shape[1] == 1:
            token = [x if x is None or x.dim() < 3 else x[:, 0] for x in inputs]
            o, cache["memory"] = STEPS[operator](*token, cache["memory"], **options)
            return o[:, None]
        o, state = operator(
            *inputs,
            initial_state=None if cache is None else cache.get("memory"),
            output_final_state=cache is not None,
            cu_seqlens=self.cu_seqlens,
            **options,
        )
        if cache is not None:
            cache["memory"] = state
        return o

    @opaque
    def look_back(
        self,
        operator: Callable[..., tuple[Any, ...]],
        x: Tensor,
        *parameters: Tensor,
        reach: int,
        cache: Cache = None,
        name: str = "columns",
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """The outputs of an operator of `kernels` that sees x [B, T, C] and `reach` columns before each token, zeros where a
        sequence had not begun; continued from cache[name] [B, reach, C] and remembered there.
        """
        if cache is not None and name in cache and x.shape[1] == 1:
            *token, cache[name] = STEPS[operator](x[:, 0], *parameters, cache[name], **options)
            return tuple(output[:, None] for output in token)
        *outputs, columns = operator(
            x,
            *parameters,
            initial_state=None if cache is None else cache.get(name),
            output_final_state=cache is not None,
            cu_seqlens=self.cu_seqlens,
            **options,
        )
        if cache is not None:
            cache[name] = columns
        return tuple(outputs)

    def history(
        self, x: Tensor, reach: int, before: Tensor | None = None, cache: Cache = None, name: str = "history"
    ) -> list[Tensor]:
        """x [B, T, C] of `reach`, ..., 1 and 0 tokens ago, continued from cache[name] and remembered there.

        before [C]: what stands where a sequence had not begun; zeros when left out.
        """
        T = x.shape[1]
        before = x.new_zeros(x.shape[2]) if before is None else before.to(x.dtype)
        past = cache[name] if cache is not None and name in cache else before.expand(x.shape[0], reach, -1)
        stream = torch.cat((past, x), dim=1)
        ago = range(reach, -1, -1)
        steps = [stream[:, reach - n : reach - n + T] for n in ago]
        if self.cu_seqlens is not None:
            positions = self.positions[..., None]
            steps = [torch.where(positions < n, before, step) if n else step for n, step in zip(ago, steps)]
        if cache is not None:
            packed = self.cu_seqlens is not None
            # A view would keep the whole prompt.
            cache[name] = torch.stack([self.last(step) for step in steps[1:]], 1) if packed else stream[:, T:].clone()
        return steps

    def last(self, x: Tensor) -> Tensor:
        """x [B, T, ...] at the last token of each sequence: [B, ...], or [N, ...] for N packed ones (none of them empty)."""
        return x[:, -1] if self.cu_seqlens is None else x[0, self.cu_seqlens[1:].long() - 1]

    def following(self, row: Tensor, fill: int) -> Tensor:
        """row [B, T] shifted left by one within each sequence; the last place of each sequence gets `fill`."""
        return pad(row[:, 1:].masked_fill(self.positions[:, 1:] == 0, fill), (0, 1), value=fill)

    @opaque
    def owners(self) -> tuple[Tensor, int]:
        """(the sequence of each token, int64 [B * T]; how many there are), rows one after the other."""
        B, T = self.positions.shape
        if self.cu_seqlens is None:
            return torch.arange(B * T, device=self.positions.device) // T, B
        lengths = self.cu_seqlens.diff().long()
        numbers = torch.arange(lengths.numel(), device=lengths.device)
        return numbers.repeat_interleave(lengths, output_size=T), lengths.numel()

    def total(self, counts: Tensor) -> Tensor:
        """Counts over the tokens of this call, summed over whoever else holds tokens of the same rows: here nobody does."""
        return counts


def _remember(cache: dict[str, Any], k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Adds k and v [B, T, HKV, K] to the layer's cache; returns all keys and values that these T queries may see."""
    k, v = _after_held(cache, "k", k), _after_held(cache, "v", v)
    # A window never looks back further than window - 1 keys from the next token.
    keep = k.shape[1] if window is None else min(k.shape[1], window - 1)
    cache["k"], cache["v"] = k[:, k.shape[1] - keep :], v[:, v.shape[1] - keep :]
    return k, v


def _after_held(cache: dict[str, Any], name: str, x: Tensor) -> Tensor:
    """x [B, T, ...] after what the cache holds of the tokens before it."""
    return torch.cat((cache[name], x), dim=1) if name in cache else x
