"""The decoder: embedding, a pattern of layers, final norm, output head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels import linear_cross_entropy
from parallel.config import Strict
from pretrain.model.block import Block
from pretrain.model.cache import DecoderCache
from pretrain.model.ffns.moe import MoE
from pretrain.model.norm import RMSNorm
from pretrain.model.pattern import expand
from pretrain.model.router import Router
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import FFNConfig, MixerConfig, Sublayer, by_kind, init_normal

if TYPE_CHECKING:
    AnyMixer: TypeAlias = MixerConfig
    AnyFFN: TypeAlias = FFNConfig
else:
    AnyMixer = by_kind("pretrain.model.mixers", MixerConfig)
    AnyFFN = by_kind("pretrain.model.ffns", FFNConfig)


class DecoderConfig(Strict):
    """The architecture. Sublayers are defined once by name and used in the layer pattern."""

    vocabulary: int | None = Field(None, ge=1)
    """Tokens the model knows; the tokenizer's, rounded up to a multiple of 64, when left out."""
    width: int = Field(ge=1)
    """Channels of the residual stream."""
    mixers: dict[str, AnyMixer] = Field(min_length=1)
    ffns: dict[str, AnyFFN] = Field(min_length=1)
    layers: list[str] = Field(min_length=1)
    """The pattern, for example [gdn + moe x3, attention + moe]."""
    repeat: int = Field(1, ge=1)
    """How often the pattern is repeated."""
    tie_embeddings: bool = True
    norm_eps: float = Field(1e-6, gt=0)
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of initial weights; those that write to the residual stream are divided by sqrt(2 * layers)."""

    @model_validator(mode="after")
    def _pattern_is_defined(self) -> DecoderConfig:
        self.pattern()
        return self

    def pattern(self) -> list[tuple[str, str]]:
        return expand(self.layers, self.repeat, list(self.mixers), list(self.ffns))


class Decoder(nn.Module):
    """tokens [B, T] -> logits, or the summed loss when targets are given. Knows nothing of processes or devices."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        if config.vocabulary is None:
            raise ValueError("model.vocabulary is not set; it comes from the tokenizer or the config")
        self.config = config
        width = config.width
        self.embedding = nn.Embedding(config.vocabulary, width)
        self.blocks = nn.ModuleList()
        for mixer, ffn in config.pattern():
            sublayers = config.mixers[mixer].build(width), config.ffns[ffn].build(width)
            self.blocks.append(Block(width, *sublayers, config.norm_eps))
        self.norm = RMSNorm(width, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(width, config.vocabulary, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        std = self.config.init_std
        init_normal(self, std)
        for module in self.modules():
            if isinstance(module, MoE | Router):
                module.reset_parameters(std)
        writes = [weight for part in self.sublayers() for weight in part.output_projections()]
        for weight in writes:
            weight.div_(math.sqrt(max(1, len(writes))))

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: DecoderCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits fp32 [B, T, vocabulary], or with targets the sum of the cross entropies in nats (fp32 scalar).

        tokens: int64 [B, T]. targets: int64 [B, T], -100 where there is none. cu_seqlens: int32 [N+1], the borders of packed
        sequences (then B = 1): no layer looks across them. cache: tokens follow those it has seen; it is updated in place.
        last_only: logits of the last position only, [B, 1, vocabulary].
        """
        sequence = SequenceContext.of(tokens, cu_seqlens, cache.length if cache is not None else 0)
        x = self.embedding(tokens)
        for index, block in enumerate(self.blocks):
            x = block(x, sequence, cache.layers[index] if cache is not None else None)
        if cache is not None:
            cache.length += tokens.shape[1]
        x = self.norm(x[:, -1:] if last_only else x)
        weight = self.embedding.weight if self.head is None else self.head.weight
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        if targets is not None:
            return linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), reduction="sum")
        return nn.functional.linear(x, weight).float()

    def new_cache(self) -> DecoderCache:
        return DecoderCache.empty(len(self.blocks))

    def sublayers(self) -> Iterator[Sublayer]:
        """Every mixer and FFN, in the order of the forward pass."""
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block.mixer
            yield block.ffn

    def routers(self) -> dict[str, Router]:
        """Every MoE layer's router by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Router)}

    def flops_per_token(self, context: float) -> float:
        """Forward FLOPs for one token that sees `context` keys on average; the output head included, the look-up not."""
        head = 2.0 * self.embedding.weight.shape[0] * self.embedding.weight.shape[1]
        return head + sum(part.flops_per_token(context) for part in self.sublayers())

    def active_parameters(self) -> int:
        """Parameters that one token uses, embedding and head included."""
        total = sum(parameter.numel() for parameter in self.parameters())
        for part in self.sublayers():
            total += part.active_parameters() - sum(parameter.numel() for parameter in part.parameters())
        return total
