"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), by default as in Kimi Linear (arXiv 2510.26692).

    c = RMSNorm(W_c x),   p = W_p x [rotated]                 the compressed latent, and a key part that all heads share
    q_h = [q_h' ; q_h'' [rotated]],   k_h = [W_UK,h c ; p],   v_h = W_UV,h c
    o_h = softmax(q_h k_h^T / sqrt(d)) v_h

The cache holds c and p only. Without `rope` there are no positions at all; with it, this is DeepSeek-V3's attention.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kernels import rms_norm
from pretrain.model.rotary import apply_rotary
from pretrain.model.sequence import SequenceContext
from pretrain.model.split import Section, Split, columns, rows
from pretrain.model.sublayer import Mixer, MixerConfig, linear_flops, require


class MLAConfig(MixerConfig):
    kind: Literal["mla"] = "mla"
    heads: int = Field(ge=1)
    """Heads; each has its own queries, keys and values."""
    kv_rank: int = Field(ge=1)
    """Channels of the latent that keys and values are made from."""
    query_rank: int | None = Field(None, ge=1)
    """Channels of the latent that queries are made from; queries come from x directly when left out."""
    head_dim: int = Field(128, ge=1)
    """Channels of a head's own part of queries and keys, never rotated."""
    shared_dim: int = Field(64, ge=0)
    """Channels of the key part that all heads share, which each query also has; 0 for none."""
    value_dim: int | None = Field(None, ge=1)
    """Channels of a value head; head_dim when left out."""
    rope: bool = False
    """Rotate the shared part (DeepSeek-V3). Without it no part knows positions (Kimi Linear)."""
    rope_theta: float = Field(10_000.0, gt=0)
    norm_eps: float = Field(1e-6, gt=0)
    """Added to the mean square in the norms of the latents."""
    scale: float | None = Field(None, gt=0)
    """Factor on the scores before the softmax; 1 / sqrt(head_dim + shared_dim) when left out."""

    def build(self, width: int) -> MLA:
        return MLA(width, self)


class MLA(Mixer):
    def __init__(self, width: int, config: MLAConfig):
        super().__init__()
        require(
            not config.rope or (config.shared_dim > 0 and config.shared_dim % 2 == 0),
            f"shared_dim={config.shared_dim} cannot be rotated in pairs; choose an even number above 0, or rope=False",
        )
        self.heads, self.kv_rank = config.heads, config.kv_rank
        self.head_dim, self.shared_dim = config.head_dim, config.shared_dim
        self.value_dim = config.value_dim or config.head_dim
        self.rope, self.rope_theta, self.norm_eps = config.rope, config.rope_theta, config.norm_eps
        self.scale = config.scale or (self.head_dim + self.shared_dim) ** -0.5
        q_width = self.heads * (self.head_dim + self.shared_dim)
        self.query_down: nn.Linear | None = None
        self.query_norm: nn.Parameter | None = None
        if config.query_rank is not None:
            self.query_down = nn.Linear(width, config.query_rank, bias=False)
            self.query_norm = nn.Parameter(torch.ones(config.query_rank))
        self.query = nn.Linear(config.query_rank or width, q_width, bias=False)
        self.kv_down = nn.Linear(width, self.kv_rank + self.shared_dim, bias=False)
        self.kv_norm = nn.Parameter(torch.ones(self.kv_rank))
        self.kv_up = nn.Linear(self.kv_rank, self.heads * (self.head_dim + self.value_dim), bias=False)
        self.out = nn.Linear(self.heads * self.value_dim, width, bias=False)

    def forward(self, x: Tensor, sequence: SequenceContext, cache: dict[str, Any] | None = None) -> Tensor:
        q, shared = self._queries(x).split((self.head_dim, self.shared_dim), dim=-1)
        latent, p = self.kv_down(x).split((self.kv_rank, self.shared_dim), dim=-1)
        latent = rms_norm(latent, self.kv_norm, self.norm_eps)
        if self.rope:
            cos, sin = sequence.rotary(self.shared_dim, self.rope_theta)
            shared, p = apply_rotary(shared, cos, sin), apply_rotary(p[:, :, None], cos, sin)[:, :, 0]
        memory = sequence.extend(torch.cat((latent, p), dim=-1), cache, "latent")
        o = (self._absorbed if self._absorbing(x.shape[1], memory.shape[1]) else self._expanded)(
            q, shared, memory, sequence
        )
        return self.out(o.flatten(-2))

    def _queries(self, x: Tensor) -> Tensor:
        if self.query_down is not None and self.query_norm is not None:
            x = rms_norm(self.query_down(x), self.query_norm, self.norm_eps)
        return self.query(x).unflatten(-1, (self.heads, -1))

    def _expanded(self, q: Tensor, shared: Tensor, memory: Tensor, sequence: SequenceContext) -> Tensor:
        """Every head's keys and values made from the latents: the cheaper way when queries are as many as keys."""
        latent, p = memory.split((self.kv_rank, self.shared_dim), dim=-1)
        kv = self.kv_up(latent).unflatten(-1, (self.heads, -1))
        k, v = kv.split((self.head_dim, self.value_dim), dim=-1)
        k = torch.cat((k, p[:, :, None].expand(-1, -1, self.heads, -1)), dim=-1)
        q = torch.cat((q, shared), dim=-1)
        return sequence.attend(q, k, v, scale=self.scale)

    def _absorbed(self, q: Tensor, shared: Tensor, memory: Tensor, sequence: SequenceContext) -> Tensor:
        """The same with W_UK moved to the queries and W_UV to the outputs: heads attend to the latents themselves."""
        up = self.kv_up.weight.unflatten(0, (self.heads, -1))
        up_k, up_v = up.split((self.head_dim, self.value_dim), dim=1)
        q = torch.cat((torch.einsum("bthd,hdr->bthr", q, up_k), shared), dim=-1)
        kv = memory[:, :, None]
        # The shared part rides along in the values and is dropped: equal widths spare a padded copy of the cache.
        o = sequence.attend(q, kv, kv, scale=self.scale)[..., : self.kv_rank]
        return torch.einsum("bthr,hdr->bthd", o, up_v)

    def _absorbing(self, T: int, S: int) -> bool:
        """Whether T queries over S cached latents cost fewer multiplications in the absorbed form."""
        if S == T:
            return False
        own = self.kv_rank * (self.head_dim + self.value_dim)
        expanded = S * own + T * S * (self.head_dim + self.shared_dim + self.value_dim)
        absorbed = T * own + T * S * 2 * (self.kv_rank + self.shared_dim)
        return absorbed < expanded

    def flops_per_token(self, context: float) -> float:
        weights = [self.query.weight, self.kv_down.weight, self.kv_up.weight, self.out.weight]
        weights += [] if self.query_down is None else [self.query_down.weight]
        scores = 2.0 * self.heads * (self.head_dim + self.shared_dim + self.value_dim) * context
        return linear_flops(*weights) + scores

    def output_projections(self) -> list[Tensor]:
        return [self.out.weight]

    def splits(self) -> dict[str, Split]:
        """By heads; the latents, from which all heads read, stay whole."""

        def of(width: int) -> Section:
            return Section(width, self.heads, "heads")

        query, kv = of(self.query.out_features), of(self.kv_up.out_features)
        return (
            rows(self.query, "query", query) | rows(self.kv_up, "kv_up", kv) | columns("out", of(self.out.in_features))
        )

    def shrink(self, rank: int, ranks: int) -> None:
        self.heads //= ranks
