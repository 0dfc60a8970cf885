"""Softmax attention with grouped key/value heads; full or sliding-window; full, partial or no rotary positions.

    q, k, v = W x [+ b],   q and k optionally RMS-normalised, then rotated
    o_i = sum_j softmax_j(scale * q_i . k_j) v_j,   y = W_o (o [* sigmoid(W_g x)]) [+ b_o]

Sources: grouped queries: Ainslie et al. 2023 (arXiv 2305.13245); q/k norm per head: Dehghani et al. 2023 (arXiv 2302.05442);
over the whole projection: OLMo 2 (arXiv 2501.00656, section 3); the output gate: Qiu et al. 2025 (arXiv 2505.06708), as in
Qwen3-Next. `heads * head_dim` may differ from the model's width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kernels import rms_norm
from pretrain.model.linear_parts import draw_taps
from pretrain.model.norm import norm_of_part
from pretrain.model.rotary import apply_rotary, rotary_channels
from pretrain.model.sequence import SequenceContext
from pretrain.model.split import Section, SharedBias, Split, columns, rows
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
    """RMSNorm on queries and keys before the rotation."""
    qk_norm_over: Literal["head", "width"] = "head"
    """What one norm runs over: each head by itself (Qwen3), or all heads' channels together (OLMo 2)."""
    zero_centered_norm: bool = False
    """The q/k norm multiplies by 1 + weight in place of weight, so that weight decay pulls towards 1 (Qwen3-Next)."""
    norm_eps: float = Field(1e-6, gt=0)
    """Added to the mean square in the q/k norm."""
    output_gate: bool = False
    """Multiply the heads' output by sigmoid(W_g x), one gate a channel (Qwen3-Next)."""
    qkv_bias: bool = False
    """Biases on the query, key, value and gate projections (Qwen2)."""
    out_bias: bool = False
    """A bias on the output projection."""
    scale: float | None = Field(None, gt=0)
    """Factor on the scores before the softmax; 1 / sqrt(head_dim) when left out."""
    conv_width: int = Field(0, ge=0)
    """Taps of a short causal convolution on queries, keys and values; 0 for none. With it, one layer can compare a key with the
    token before another, which two plain layers learn slowly."""
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
        require_groups(self.heads, self.kv_heads)
        require(
            config.qk_norm or not config.zero_centered_norm,
            "zero_centered_norm=True has no norm to act on with qk_norm=False; set qk_norm=True or leave it out",
        )
        self.head_dim = config.head_dim or width // self.heads
        self.rotary_dim = rotary_channels(self.head_dim, config.rope_fraction)
        self.rope_theta, self.window, self.scale = config.rope_theta, config.window, config.scale
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.sections = (q_width, kv_width, kv_width)
        self.norm_widths, self.kv_copies = (q_width, kv_width), 1  # of all heads, also in a part of them
        self.qkv = nn.Linear(width, sum(self.sections), bias=config.qkv_bias)
        self.conv = nn.Parameter(torch.empty(sum(self.sections), config.conv_width)) if config.conv_width else None
        self.gate = nn.Linear(width, q_width, bias=config.qkv_bias) if config.output_gate else None
        self.out = nn.Linear(q_width, width, bias=config.out_bias)
        self.norm_over, self.norm_eps = config.qk_norm_over, config.norm_eps
        self.zero_centered_norm = config.zero_centered_norm
        q_norm, k_norm = (self.head_dim, self.head_dim) if config.qk_norm_over == "head" else (q_width, kv_width)
        self.q_norm = nn.Parameter(torch.empty(q_norm)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.empty(k_norm)) if config.qk_norm else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.conv is not None:
            draw_taps(self.conv)
        for weight in (self.q_norm, self.k_norm):
            if weight is not None:
                weight.fill_(0.0 if self.zero_centered_norm else 1.0)

    def forward(self, x: Tensor, sequence: SequenceContext, cache: dict[str, Any] | None = None) -> Tensor:
        mixed = self.qkv(x)
        if self.conv is not None:
            mixed = sequence.convolve(mixed, self.conv, None, None, cache)
        q, k, v = mixed.split(self.sections, dim=-1)
        q, k, v = self._heads(q, self.q_norm, "q"), self._heads(k, self.k_norm, "k"), self._heads(v, None, "v")
        if self.rotary_dim:
            cos, sin = sequence.rotary(self.rotary_dim, self.rope_theta)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        o = sequence.attend(q, k, v, scale=self.scale, window=self.window, cache=cache).flatten(-2)
        if self.gate is not None:
            gate = self.gate(x)
            o = o * torch.sigmoid(gate.to(_wide(gate))).to(o.dtype)
        return self.out(o)

    def _heads(self, x: Tensor, norm: Tensor | None, what: Literal["q", "k", "v"]) -> Tensor:
        """x [B, T, H * K] -> [B, T, H, K], normalised where there is a weight."""
        if norm is not None and self.zero_centered_norm:
            norm = 1.0 + norm.to(_wide(norm))  # in bf16 a small weight would vanish beside the 1
        if norm is not None and self.norm_over == "width":
            x = self._norm_all(x, norm, what)
        x = x.unflatten(-1, (-1, self.head_dim))
        return rms_norm(x, norm, self.norm_eps) if norm is not None and self.norm_over == "head" else x

    def _norm_all(self, x: Tensor, norm: Tensor, what: Literal["q", "k", "v"]) -> Tensor:
        """x [B, T, H * K], all heads together, of which this module may hold a part."""
        width, copies = (self.norm_widths[0], 1) if what == "q" else (self.norm_widths[1], self.kv_copies)
        if x.shape[-1] == width:
            return rms_norm(x, norm, self.norm_eps)
        return norm_of_part(x, norm, self.norm_eps, width * copies, self.across)

    def flops_per_token(self, context: float) -> float:
        keys = context if self.window is None else min(context, self.window)
        gate = 0.0 if self.gate is None else linear_flops(self.gate.weight)
        gate += 0.0 if self.conv is None else 2.0 * self.conv.numel()
        return linear_flops(self.qkv.weight, self.out.weight) + gate + 4.0 * self.heads * self.head_dim * keys

    def output_projections(self) -> list[Tensor]:
        return [self.out.weight]

    def splits(self) -> dict[str, Split]:
        q, kv = head_sections(self.heads, self.kv_heads, self.head_dim)
        splits = rows(self.qkv, "qkv", q, kv, kv) | columns("out", q)
        if self.gate is not None:
            splits |= rows(self.gate, "gate", q)
        if self.conv is not None:
            splits["conv"] = Split(0, (q, kv, kv))
        if self.q_norm is not None and self.norm_over == "width":
            splits |= {"q_norm": Split(0, (q,)), "k_norm": Split(0, (kv,))}
        return splits

    def shrink(self, rank: int, ranks: int) -> None:
        self.kv_copies = max(1, ranks // self.kv_heads)
        self.heads, self.kv_heads = self.heads // ranks, max(1, self.kv_heads // ranks)
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.sections = (q_width, kv_width, kv_width)
        self.out = SharedBias(self.out, ranks)


def head_sections(heads: int, kv_heads: int, head_dim: int) -> tuple[Section, Section]:
    """How queries and how keys or values are cut: by heads; a key head that serves several parts is held by each."""
    return (
        Section(heads * head_dim, heads, "heads"),
        Section(kv_heads * head_dim, kv_heads, "kv_heads", shared=kv_heads < heads),
    )


def require_groups(heads: int, kv_heads: int) -> None:
    """Raises ValueError unless the query heads can share the key/value heads evenly."""
    divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
    require(heads % kv_heads == 0, f"kv_heads={kv_heads} does not divide heads={heads}; choose one of {divisors}")


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
