"""Selective multi-head attention (Yang et al. 2025, arXiv 2503.02495): heads are experts, each among the tokens it takes.

    S_i = the tokens of a sequence that expert i takes
    A_i(x_t) = softmax over s in S_i, s <= t, of (q_t . k_s / sqrt(d)) v_s W_o_i   for t in S_i, else 0
    y_t = sum_i A_i(x_t)

A token that expert i does not take neither asks nor is seen there. Rotations are by the original positions. With all tokens
in all heads this is multi-head attention. Which tokens an expert takes: pretrain/model/union.py.

The experts' lists are packed end to end: a row of (expert, sequence) segments goes through the attention kernel.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kernels import attention, rms_norm
from kernels.common.opaque import opaque
from pretrain.model.mixers.attention import AttentionConfig, require_groups
from pretrain.model.rotary import apply_rotary, rotary_channels
from pretrain.model.sequence import SequenceContext
from pretrain.model.split import Section, Split
from pretrain.model.sublayer import Mixer, MixerConfig, linear_flops, require
from pretrain.model.union import RoutingConfig
from pretrain.model.union_rows import Rows, per_expert

GROWTH = 1.5  # a full cache grows by this factor: copying stays in proportion to the tokens stored


class SelectiveAttentionConfig(RoutingConfig, MixerConfig):
    kind: Literal["smha"] = "smha"
    heads: int = Field(ge=1)
    """Query heads."""
    kv_heads: int | None = Field(None, ge=1)
    """Key/value heads, a divisor of heads; the same number when left out."""
    experts: int | None = Field(None, ge=1)
    """Groups of heads that take tokens together, a divisor of kv_heads; each key/value head by itself when left out."""
    head_dim: int | None = Field(None, ge=2)
    """Channels per head; width / heads when left out."""
    rope_fraction: float = Field(1.0, ge=0.0, le=1.0)
    """Share of each head's channels that is rotated; 0 for no positions at all (NoPE)."""
    rope_theta: float = Field(10_000.0, gt=0)
    qk_norm: bool = True
    """RMSNorm on queries and keys, each head by itself, before the rotation."""
    norm_eps: float = Field(1e-6, gt=0)
    """Added to the mean square in the q/k norm."""

    def build(self, width: int) -> SelectiveAttention:
        return SelectiveAttention(width, self)

    def shards(self) -> int:
        """Number of experts."""
        return self.experts or self.kv_heads or self.heads

    def dense(self) -> AttentionConfig:
        """The config of the dense block."""
        names = ("heads", "kv_heads", "head_dim", "rope_fraction", "rope_theta", "qk_norm", "norm_eps")
        return AttentionConfig(**{name: getattr(self, name) for name in names})


class SelectiveAttention(Mixer):
    fixed_memory = False
    whole_sequence = "each expert attends among the tokens that it takes, wherever they lie"

    reads_wide = True
    own: slice | None = None  # in a part: its experts among all

    def __init__(self, width: int, config: SelectiveAttentionConfig):
        super().__init__()
        kv_heads = config.kv_heads or config.heads
        n = config.shards()
        require(
            config.head_dim is not None or width % config.heads == 0,
            f"heads={config.heads} does not divide width={width}; set head_dim or change heads",
        )
        require_groups(config.heads, kv_heads)
        divisors = ", ".join(str(i) for i in range(1, kv_heads + 1) if kv_heads % i == 0)
        require(kv_heads % n == 0, f"experts={n} does not divide kv_heads={kv_heads}; choose one of {divisors}")
        self.heads, self.kv_heads = config.heads // n, kv_heads // n  # of one expert
        self.head_dim = config.head_dim or width // config.heads
        self.rotary_dim = rotary_channels(self.head_dim, config.rope_fraction)
        self.rope_theta, self.norm_eps = config.rope_theta, config.norm_eps
        self.routing = config.routing(width, n)
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.sections = (q_width, kv_width, kv_width)
        self.qkv = nn.Parameter(torch.empty(n, width, sum(self.sections)))
        self.out = nn.Parameter(torch.empty(n, q_width, width))
        self.q_norm = nn.Parameter(torch.ones(self.head_dim)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(self.head_dim)) if config.qk_norm else None

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        self.qkv.normal_(0.0, std)
        self.out.normal_(0.0, std)

    @opaque  # who takes how much differs from row to row
    def forward(self, x: Tensor, sequence: SequenceContext, cache: dict[str, Any] | None = None) -> Tensor:
        selection = self.routing(x, sequence, cache)
        selection = selection if self.own is None else selection.of(self.own)
        rows = Rows.of(selection.mask.flatten(0, 1))
        cos_sin = [part.flatten(0, 1)[rows.token][None] for part in self._rotary(sequence)]
        projected = per_expert(rows.of_tokens(_autocast(x.flatten(0, 1))), self.qkv, rows.counts)
        q, k, v = self._heads(projected[None], cos_sin)
        segments = _segments(rows, sequence, x.shape[0])
        if cache is None:
            o = attention(q, k, v, cu_seqlens=segments.borders)
        else:
            stored = remember(cache, k[0], v[0], segments)
            o = attention(q, stored.k, stored.v, cu_seqlens=stored.borders_q, cu_seqlens_k=stored.borders)
        o = o[0].flatten(-2)
        o = o * rows.of_pairs(selection.factor.flatten(0, 1)).to(o.dtype)[:, None]
        return rows.combine(per_expert(o, self.out, rows.counts)).view(x.shape)

    def masked(self, x: Tensor, sequence: SequenceContext) -> Tensor:
        """The definition: every head over all tokens, with the scores of those it does not take masked. For tests."""
        selection = self.routing(x, sequence)
        T = x.shape[1]
        positions = torch.arange(T, device=x.device)
        begin = positions - sequence.positions  # [B, T], the same for tokens of one sequence
        visible = (positions[:, None] >= positions) & (begin[:, :, None] == begin[:, None, :])
        y = torch.zeros_like(x)
        for i in range(self.qkv.shape[0]):
            q, k, v = self._heads(x @ self.qkv[i], self._rotary(sequence))
            k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=2) for part in (k, v))
            taken = selection.mask[..., i]
            sees = visible & taken[:, :, None] & taken[:, None, :]
            scores = torch.einsum("bthk,bshk->bhts", q, k) * self.head_dim**-0.5
            weights = scores.masked_fill(~sees[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
            o = torch.einsum("bhts,bshk->bthk", weights, v).flatten(-2) * selection.factor[..., i, None]
            y = y + o @ self.out[i]
        return y

    def _rotary(self, sequence: SequenceContext) -> list[Tensor]:
        return list(sequence.rotary(self.rotary_dim, self.rope_theta)) if self.rotary_dim else []

    def _heads(self, projected: Tensor, cos_sin: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, (heads + 2 kv_heads) * K] of one expert a token -> q, k, v [B, T, heads, K], normalised and rotated."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in projected.split(self.sections, dim=-1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm, self.norm_eps), rms_norm(k, self.k_norm, self.norm_eps)
        if cos_sin:
            q, k = apply_rotary(q, *cos_sin), apply_rotary(k, *cos_sin)
        return q, k, v

    def flops_per_token(self, context: float) -> float:
        # A selected query sees the selected part of its context.
        share, n = self.routing.share(context), self.qkv.shape[0]
        scores = 4.0 * n * self.heads * self.head_dim * share * share * context
        return share * linear_flops(self.qkv, self.out) + scores + self.routing.flops_per_token()

    def active_parameters(self) -> int:
        shards = self.qkv.numel() + self.out.numel()
        return super().active_parameters() - shards + round(self.routing.mean_share * shards)

    def output_projections(self) -> list[Tensor]:
        return [self.out]

    def end_to_end(self) -> dict[str, tuple[int, list[int]]]:
        """Parameters that hold several matrices end to end: the dim, and the matrices' lengths along it."""
        return {"qkv": (2, list(self.sections))}

    def splits(self) -> dict[str, Split]:
        experts = Split(0, (Section.even(self.qkv.shape[0], "experts"),))
        return {"qkv": experts, "out": experts}

    def shrink(self, rank: int, ranks: int) -> None:
        own = self.qkv.shape[0]
        self.own = slice(rank * own, (rank + 1) * own)
        if rank > 0:
            self.routing.silence()


class Segments(NamedTuple):
    """The (expert, sequence) segments of packed rows.

    counts: int64 [n * N], rows of each. borders: int32 [n * N + 1], where each begins. of: int64 [P], the segment of each row.
    """

    counts: Tensor
    borders: Tensor
    of: Tensor


def _segments(rows: Rows, sequence: SequenceContext, batch: int) -> Segments:
    T = sequence.positions.shape[1]
    cu = sequence.cu_seqlens
    if cu is None:
        owner, number = rows.token // T, batch
    else:
        number = cu.numel() - 1
        owner = torch.repeat_interleave(torch.arange(number, device=cu.device), cu.diff().long(), output_size=T)
        owner = owner[rows.token]
    of = rows.expert * number + owner
    counts = torch.bincount(of, minlength=len(rows.counts) * number)
    return Segments(counts, _borders(counts), of)


def _borders(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


class Stored(NamedTuple):
    """Keys and values [1, S, HKV, K] of the segments that have queries, and both borders, int32 [segments + 1]."""

    k: Tensor
    v: Tensor
    borders: Tensor
    borders_q: Tensor


def remember(cache: dict[str, Any], k: Tensor, v: Tensor, segments: Segments) -> Stored:
    """Appends the rows k, v [P, HKV, K] to their segments' lists; returns the lists of all segments that have queries.

    The cache holds taken_k and taken_v [n * B, L, HKV, K], of which the first count int64 [n * B] are in use.
    """
    new, of = segments.counts, segments.of
    count = cache.get("count")
    if count is None:
        count = torch.zeros_like(new)
    total = count + new
    longest = int(total.max())
    rank = torch.arange(of.shape[0], device=of.device) - segments.borders[of].long()
    slot = count[of] + rank
    active = new.nonzero()[:, 0]
    seen = torch.arange(longest, device=of.device) < total[active][:, None]
    lists = []
    for name, rows in (("taken_k", k), ("taken_v", v)):
        held = cache.get(name)
        if held is None or held.shape[1] < longest:
            old = 0 if held is None else held.shape[1]
            grown = rows.new_zeros(new.shape[0], max(longest, int(GROWTH * old)), *rows.shape[1:])
            if held is not None:
                grown[:, :old] = held
            held = grown
        held[of, slot] = rows
        cache[name] = held
        lists.append(held[active, :longest][seen][None])
    cache["count"] = total
    if active.numel() == 0:
        return Stored(lists[0], lists[1], segments.borders[:2] * 0, segments.borders[:2] * 0)
    return Stored(lists[0], lists[1], _borders(total[active]), _borders(new[active]))


def _autocast(x: Tensor) -> Tensor:
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x
