"""The decoder: embedding, a pattern of layers, final norm, output head."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from parallel.config import Strict
from pretrain.model.block import Block, BlockConfig
from pretrain.model.cache import DecoderCache
from pretrain.model.multi_token import IGNORED, MultiToken, MultiTokenConfig
from pretrain.model.norm import RMSNorm
from pretrain.model.pattern import Layer, expand
from pretrain.model.readout import Readout
from pretrain.model.router import Balanced
from pretrain.model.sequence import SequenceContext
from pretrain.model.split import Section, Split
from pretrain.model.sublayer import Carry, FFNConfig, MixerConfig, Sublayer, by_kind, init_normal, linear_flops

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
    ffns: dict[str, AnyFFN] = Field(default_factory=dict)
    layers: list[str] = Field(min_length=1)
    """The pattern, for example [gdn + moe x3, attention + moe]; a single name is a layer with that sublayer only."""
    repeat: int = Field(1, ge=1)
    """How often the pattern is repeated."""
    block: BlockConfig = BlockConfig()
    multi_token: MultiTokenConfig | None = None
    """Predict the token after next as well, with one extra layer during training."""
    tie_embeddings: bool = True
    norm_eps: float = Field(1e-6, gt=0)
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of initial weights; those that write to the residual stream are divided by the square root of
    their number (two a layer, more in stacks)."""

    @model_validator(mode="after")
    def _pattern_is_defined(self) -> DecoderConfig:
        self.pattern()
        self.extra_layer()
        unknown = [name for name in self.block.norm_of if name not in self.mixers]
        if unknown:
            raise ValueError(f"block.norm_of names {unknown[0]!r}, but mixers defines only {', '.join(self.mixers)}")
        return self

    def pattern(self) -> list[Layer]:
        return expand(self.layers, self.repeat, list(self.mixers), list(self.ffns))

    def extra_layer(self) -> Layer | None:
        """The multi-token layer."""
        if self.multi_token is None:
            return None
        pairs = expand([self.multi_token.layer], 1, list(self.mixers), list(self.ffns))
        if len(pairs) != 1:
            raise ValueError(f"multi_token.layer = {self.multi_token.layer!r}: exactly one layer, without a count")
        return pairs[0]


class Decoder(nn.Module):
    """tokens [B, T] -> logits, or the summed loss when targets are given. Knows nothing of processes or devices."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        if config.vocabulary is None:
            raise ValueError("model.vocabulary is not set; it comes from the tokenizer or the config")
        self.config = config
        self.sequence_of = SequenceContext.of  # what layers are told of their sequences; replaced from outside
        width = config.width
        self.embedding = nn.Embedding(config.vocabulary, width)
        if config.block.residual_scaling:
            self.embedding_scale = nn.Parameter(torch.ones(width))
            self.embedding_bias = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(self._block(layer) for layer in config.pattern())
        self.norm = RMSNorm(width, config.norm_eps, config.block.zero_centered_norms)
        self.head = None if config.tie_embeddings else nn.Linear(width, config.vocabulary, bias=False)
        extra = config.extra_layer()
        self.multi_token = MultiToken(width, config.norm_eps, self._block(extra)) if extra else None
        self.readout = Readout()
        self._place()
        self.reset_parameters()

    def _block(self, layer: Layer) -> Block:
        config, width = self.config, self.config.width
        mixer = None if layer.mixer is None else config.mixers[layer.mixer].build(width)
        ffn = None if layer.ffn is None else config.ffns[layer.ffn].build(width)
        placement = config.block.norm_of.get(layer.mixer or "", config.block.norm)
        return Block(width, mixer, ffn, config.norm_eps, config.block, placement)

    def _place(self) -> None:
        """Tells every sublayer which one of its kind it is: some depend on depth."""
        main = [part for block in self.blocks for part in cast(Block, block).sublayers()]
        seen: Counter[type] = Counter()
        total = Counter(type(part) for part in main)
        for part in main:
            part.place(seen[type(part)], total[type(part)])
            seen[type(part)] += 1
        for part in [] if self.multi_token is None else self.multi_token.block.sublayers():
            part.place(total[type(part)], total[type(part)] + 1)  # one more, after the last

    @torch.no_grad()
    def reset_parameters(self) -> None:
        std = self.config.init_std
        init_normal(self, std)
        for module in self.modules():
            init_weights = getattr(type(module), "init_weights", None)
            if init_weights is not None:
                init_weights(module, std)
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
        sequences (then B = 1): no layer looks across them. cache: tokens follow those it has seen; it is updated in place
        (packed prompts fill an empty one, whose `split` then gives each prompt its own).
        last_only: logits of the last position only, [B, 1, vocabulary].

        In training, auxiliary losses (balancing, multi-token prediction) join the gradient but not the value that is returned.
        """
        if cache is not None and cache.borders is not None:
            raise ValueError("the cache holds packed prompts: go on with one of cache.split() for each of them")
        sequence = self.sequence_of(tokens, cu_seqlens, cache.length if cache is not None else 0)
        x, carry = self.embed(tokens), Carry()
        for index, block in enumerate(self.blocks):
            x, carry = block(x, sequence, cache.layers[index] if cache is not None else None, carry)
        if cache is not None:
            cache.length, cache.borders = cache.length + tokens.shape[1], cu_seqlens
        if targets is None:
            return self.logits(x, last_only)
        return self.objective(x, carry, tokens, targets, sequence)

    def objective(self, x: Tensor, carry: Carry, tokens: Tensor, targets: Tensor, sequence: SequenceContext) -> Tensor:
        """What comes after the last layer in training: the loss, with the auxiliary losses in its gradient."""
        loss = self.loss(x, targets)
        if self.training and self.multi_token is not None:
            carry = self._predict_further(x, tokens, targets, sequence, carry)
        if carry.auxiliary is not None:
            loss = loss + (carry.auxiliary - carry.auxiliary.detach())
        return loss

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> the residual stream [B, T, D], fp32 at least, whatever the weights' dtype."""
        x = self.embedding(tokens)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return (x + self.embedding_bias) * self.embedding_scale if self.config.block.residual_scaling else x

    def logits(self, x: Tensor, last_only: bool = False) -> Tensor:
        """The stream after the last layer [B, T, D] -> fp32 [B, T or 1, vocabulary]."""
        return self.readout.logits(self._normed(x), self._head_weight(), last_only)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The stream after the last layer [B, T, D] and targets [B, T] -> summed cross entropy, fp32 scalar."""
        return self.readout.loss(self._normed(x), self._head_weight(), targets)

    def _normed(self, x: Tensor) -> Tensor:
        x, device = self.norm(x), x.device.type
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x

    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def _predict_further(
        self, x: Tensor, tokens: Tensor, targets: Tensor, sequence: SequenceContext, carry: Carry
    ) -> Carry:
        assert self.multi_token is not None and self.config.multi_token is not None
        # The last place of a sequence has no following token: what stands there is never scored and no earlier place sees it.
        following_tokens = sequence.following(tokens, 0)
        following_targets = sequence.following(targets, IGNORED)
        y, carry = self.multi_token(x, self.embedding(following_tokens), sequence, carry)
        return carry.add(self.config.multi_token.weight * self.loss(y, following_targets))

    def new_cache(self) -> DecoderCache:
        return DecoderCache.empty(len(self.blocks))

    def layers(self) -> Iterator[Block]:
        """The blocks that are here: all of them, unless this is one stage of a pipeline (see stage.py)."""
        yield from (cast(Block, block) for block in self.blocks if block is not None)

    def sublayers(self) -> Iterator[Sublayer]:
        """Every mixer and FFN, in the order of the forward pass."""
        extra = [] if self.multi_token is None else [self.multi_token.block]
        for block in [*self.layers(), *extra]:
            yield from block.sublayers()

    def splits(self) -> dict[str, Split]:
        """How the decoder's own parameters are cut; its sublayers say it of theirs."""
        tokens = Split(0, (Section.even(cast(int, self.config.vocabulary), "vocabulary"),))
        head = {} if self.head is None else {"head.weight": tokens}
        return {"embedding.weight": tokens} | head

    def routers(self) -> dict[str, Balanced]:
        """Every router that the trainer balances, by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Balanced)}

    def flops_per_token(self, context: float) -> float:
        """Forward FLOPs in training for one token that sees `context` keys on average; the head included, the look-up not."""
        head = linear_flops(self._head_weight())
        if self.multi_token is not None:
            head += head + linear_flops(self.multi_token.join.weight)
        return head + sum(part.flops_per_token(context) for part in self.sublayers())

    def costs(self, context: float) -> tuple[list[float], float, float]:
        """(each layer, all before the first, all after the last): FLOPs as in flops_per_token, by which stages are cut."""
        layers = [sum(part.flops_per_token(context) for part in block.sublayers()) for block in self.layers()]
        return layers, 0.0, self.flops_per_token(context) - sum(layers)

    def active_parameters(self) -> int:
        """Parameters that one token uses, embedding and head included."""
        total = sum(parameter.numel() for parameter in self.parameters())
        for part in self.sublayers():
            total += part.active_parameters() - sum(parameter.numel() for parameter in part.parameters())
        return total
