"""Softmax attention with grouped key/value heads, partial rotary positions, optional q/k norm and sliding window."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kernels import attention, rms_norm
from pretrain.model.rotary import apply_rotary
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import Mixer, MixerConfig, linear_flops, require


class AttentionConfig(MixerConfig):
    kind: Literal["attention"] = "attention"
    heads: int = Field(ge=1)
    """Query heads."""
    kv_heads: int | None = Field(None, ge=1)
    """Key/value heads, a divisor of heads (grouped-query attention); the same number when left out."""
    head_dim: int | None = Field(None, ge=2)
    """Channels per head; width / heads when left out."""
    rope_fraction: float = Field(1.0, ge=0.0, le=1.0)
    """Share of each head's channels that is rotated; 0 for no positions at all (NoPE)."""
    rope_theta: float = Field(10_000.0, gt=0)
    qk_norm: bool = True
    """RMSNorm on each head's query and key before the rotation."""
    window: int | None = Field(None, ge=1)
    """Sliding window: how many keys a query sees, itself included; all earlier ones when left out."""

    def build(self, width: int) -> Attention:
        return Attention(width, self)


class Attention(Mixer):
    def __init__(self, width: int, config: AttentionConfig):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        require(
            config.head_dim is not None or width % self.heads == 0,
            f"heads={self.heads} does not divide width={width}; set head_dim or change heads",
        )
        require(
            self.heads % self.kv_heads == 0,
            f"kv_heads={self.kv_heads} does not divide heads={self.heads}; choose a divisor",
        )
        self.head_dim = config.head_dim or width // self.heads
        self.rotary_dim = int(self.head_dim * config.rope_fraction) // 2 * 2
        self.rope_theta, self.window = config.rope_theta, config.window
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.sections = (q_width, kv_width, kv_width)
        self.qkv = nn.Linear(width, sum(self.sections), bias=False)
        self.out = nn.Linear(q_width, width, bias=False)
        self.q_norm = nn.Parameter(torch.ones(self.head_dim)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(self.head_dim)) if config.qk_norm else None

    def forward(self, x: Tensor, sequence: SequenceContext, cache: dict[str, Any] | None = None) -> Tensor:
        q, k, v = (section.unflatten(-1, (-1, self.head_dim)) for section in self.qkv(x).split(self.sections, dim=-1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm), rms_norm(k, self.k_norm)
        if self.rotary_dim:
            cos, sin = sequence.rotary(self.rotary_dim, self.rope_theta)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = self._remember(cache, k, v)
        o = attention(q, k, v, window=self.window, cu_seqlens=sequence.cu_seqlens)
        return self.out(o.flatten(-2))

    def _remember(self, cache: dict[str, Any], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if "k" in cache:
            k, v = torch.cat((cache["k"], k), dim=1), torch.cat((cache["v"], v), dim=1)
        # A window never looks back further than window - 1 keys from the next token.
        keep = k.shape[1] if self.window is None else min(k.shape[1], self.window - 1)
        cache["k"], cache["v"] = k[:, k.shape[1] - keep :], v[:, v.shape[1] - keep :]
        return k, v

    def flops_per_token(self, context: float) -> float:
        keys = context if self.window is None else min(context, self.window)
        return linear_flops(self.qkv.weight, self.out.weight) + 4.0 * self.heads * self.head_dim * keys

    def output_projections(self) -> list[Tensor]:
        return [self.out.weight]
