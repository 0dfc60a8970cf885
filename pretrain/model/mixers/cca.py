"""Compressed convolutional attention (Figliolia et al. 2025, arXiv 2510.04476), as ZAYA1 has it (arXiv 2511.17127).

Queries, keys and values live in a space narrower than the model, and attention runs entirely inside it:

    q0, k0 = W_Q x, W_K x;   z = [q0; k0]
    s = grouped_conv(depthwise_conv(z))                       one group a head; no activation in between
    q_h = s_h + (q0_h + k0_g) / 2,   k_g = s_g + mean over the group's heads of (q0_h + k0_g) / 2
    q^ = sqrt(d) q / |q|,   k^ = T_g sqrt(d) k / |k|,   both then rotated;   scores q^ . k^ / sqrt(d)
    v_t = [W_V1 x_t ; W_V2 x_{t-1}]                           half of the value channels look one token back

The convolutions see zeros before the first token, padded once for both: there the second one sees the first one's bias.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kernels import cca
from pretrain.model.mixers.attention import require_groups
from pretrain.model.rotary import apply_rotary, rotary_channels
from pretrain.model.sequence import SequenceContext
from pretrain.model.split import Section, Split, columns, rows
from pretrain.model.sublayer import Mixer, MixerConfig, linear_flops, require


class CCAConfig(MixerConfig):
    kind: Literal["cca"] = "cca"
    heads: int = Field(ge=1)
    """Query heads; with head_dim below width / heads the queries are compressed."""
    kv_heads: int | None = Field(None, ge=1)
    """Key/value heads, a divisor of heads; the same number when left out."""
    head_dim: int = Field(128, ge=2)
    """Channels per head."""
    depthwise_taps: int = Field(2, ge=1)
    """Tokens that the first convolution sees, each channel by itself."""
    grouped_taps: int = Field(2, ge=1)
    """Tokens that the second convolution sees, all channels of one head together."""
    rope_fraction: float = Field(0.5, ge=0.0, le=1.0)
    """Share of each head's channels that is rotated; 0 for no positions at all."""
    rope_theta: float = Field(10_000.0, gt=0)
    temperature: Literal["linear", "exp"] = "linear"
    """How the learned number of each key head multiplies its keys: as it is (ZAYA1), or its exponential (the CCA paper)."""
    norm_eps: float = Field(1e-12, gt=0)
    """Added to the sum of squares when queries and keys are brought to unit length."""
    window: int | None = Field(None, ge=1)
    """Sliding window: how many keys a query sees, itself included; all earlier ones when left out."""

    def build(self, width: int) -> CCA:
        return CCA(width, self)


class CCA(Mixer):
    def __init__(self, width: int, config: CCAConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads or config.heads, config.head_dim
        require_groups(self.heads, self.kv_heads)
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        require(
            kv_width % 2 == 0,
            f"head_dim={self.head_dim} times kv_heads={self.kv_heads} is odd, but half of the value channels look one "
            "token back; choose an even head_dim",
        )
        self.rotary_dim = rotary_channels(self.head_dim, config.rope_fraction)
        self.rope_theta, self.window, self.norm_eps = config.rope_theta, config.window, config.norm_eps
        self.exponential = config.temperature == "exp"
        self.taps = (config.depthwise_taps, config.grouped_taps)
        self.mixed = (q_width, kv_width)
        self.sections = (q_width + kv_width, kv_width // 2, kv_width // 2)
        self.qkv = nn.Linear(width, sum(self.sections), bias=False)
        channels, all_heads = sum(self.mixed), self.heads + self.kv_heads
        self.depthwise = nn.Parameter(torch.empty(channels, self.taps[0]))
        self.depthwise_bias = nn.Parameter(torch.empty(channels))
        # Rows: tap by tap, oldest first, the head's input channels; columns: its output channels.
        self.grouped = nn.Parameter(torch.empty(all_heads, self.taps[1] * self.head_dim, self.head_dim))
        self.grouped_bias = nn.Parameter(torch.empty(channels))
        self.temperature = nn.Parameter(torch.empty(self.kv_heads))
        self.out = nn.Linear(q_width, width, bias=False)
        self.reset_parameters()

    @property
    def reach(self) -> int:
        return max(sum(self.taps) - 2, 1)  # values look one token back

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # What torch's Conv1d draws for these kernels.
        for weight, inputs in ((self.depthwise, self.taps[0]), (self.grouped, self.grouped.shape[1])):
            weight.uniform_(-1.0 / math.sqrt(inputs), 1.0 / math.sqrt(inputs))
        self.depthwise_bias.zero_()
        self.grouped_bias.zero_()
        # A factor of 1 on the keys: from 0, attention would be uniform and the keys without a gradient.
        self.temperature.fill_(0.0 if self.exponential else 1.0)

    def forward(self, x: Tensor, sequence: SequenceContext, cache: dict[str, Any] | None = None) -> Tensor:
        z, v, v_delayed = self.qkv(x).split(self.sections, dim=-1)
        q, k = self.queries_and_keys(z, sequence, cache)
        v_delayed, _ = sequence.history(v_delayed, 1, None, cache, "v_delayed")
        v = torch.cat((v, v_delayed), dim=-1).unflatten(-1, (-1, self.head_dim))
        if self.rotary_dim:
            cos, sin = sequence.rotary(self.rotary_dim, self.rope_theta)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        # Unit vectors and this scale are vectors of length sqrt(d) and 1 / sqrt(d).
        scale = math.sqrt(self.head_dim)
        o = sequence.attend(q, k, v, scale=scale, window=self.window, cache=cache)
        return self.out(o.flatten(-2))

    def queries_and_keys(
        self, z: Tensor, sequence: SequenceContext, cache: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """q [B, T, H, d] of length 1 and k [B, T, HKV, d] of length |T|, before the rotation, of the projections z [B, T, C]."""
        factor = self.temperature.to(torch.promote_types(self.temperature.dtype, torch.float32))
        parameters = (self.depthwise, self.depthwise_bias, self.grouped, self.grouped_bias)
        q, k = sequence.look_back(
            cca,
            z,
            *parameters,
            factor.exp() if self.exponential else factor,
            reach=sum(self.taps) - 2,
            cache=cache,
            eps=self.norm_eps,
        )
        return q, k

    def flops_per_token(self, context: float) -> float:
        keys = context if self.window is None else min(context, self.window)
        weights = (self.qkv.weight, self.depthwise, self.grouped, self.out.weight)
        return linear_flops(*weights) + 4.0 * self.heads * self.head_dim * keys

    def output_projections(self) -> list[Tensor]:
        return [self.out.weight]

    def splits(self) -> dict[str, Split]:
        """By key/value heads with all their query heads, over whose mean keys are made; values are two halves end to end."""
        q, kv = (Section(width, self.kv_heads, "kv_heads") for width in self.mixed)
        of_channels = {name: Split(0, (q, kv)) for name in ("depthwise", "depthwise_bias", "grouped_bias")}
        all_heads = (q.of(self.heads), kv.of(self.kv_heads))
        of_heads = {"grouped": Split(0, all_heads), "temperature": Split(0, all_heads[1:])}
        return rows(self.qkv, "qkv", q, kv, kv) | columns("out", q) | of_channels | of_heads

    def shrink(self, rank: int, ranks: int) -> None:
        half, own = self.mixed[1] // 2, self.mixed[1] // ranks
        undelayed = min(max(half - rank * own, 0), own)  # of its value channels, those in the first half of all
        self.heads, self.kv_heads = self.heads // ranks, self.kv_heads // ranks
        self.mixed = (self.mixed[0] // ranks, own)
        self.sections = (sum(self.mixed), undelayed, own - undelayed)
