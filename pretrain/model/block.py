"""One layer: a mixer and an FFN around the residual stream, with the norms before them, after them, or both."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from parallel.config import Strict
from pretrain.model.cache import LayerCache
from pretrain.model.norm import RMSNorm
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import FFN, Carry, ContextualFFN, Mixer, Sublayer, require

Placement = Literal["pre", "post", "peri"]


class BlockConfig(Strict):
    """How sublayers meet the residual stream."""

    norm: Placement = "pre"
    """pre: x + f(norm(x)). post: x + norm(f(x)), as in OLMo 2. peri: x + norm(f(norm(x))), Peri-LN (arXiv 2502.02732)."""
    norm_of: dict[str, Placement] = Field(default_factory=dict)
    """Another placement for the layers with the named mixers, for example {attention: post} (OLMo Hybrid)."""
    parallel: bool = False
    """Mixer and FFN read the same normalised input and are added together (PaLM): two products fewer in sequence."""
    residual_scaling: bool = False
    """Learned scale and bias per channel on the stream and on each sublayer's output (ZAYA1)."""
    zero_centered_norms: bool = False
    """Norm weights kept as their difference from 1 (Qwen3-Next)."""


class ResidualScaling(nn.Module):
    """(x + b_x) * a_x + (y + b_y) * a_y, by channel: x the stream, y a sublayer's output (ZAYA1, arXiv 2605.05365).

    Starts as x + y. The bias goes first, as in the released weights: the same functions as a * x + b, other gradients.
    """

    def __init__(self, width: int):
        super().__init__()
        self.stream_scale = nn.Parameter(torch.ones(width))
        self.stream_bias = nn.Parameter(torch.zeros(width))
        self.output_scale = nn.Parameter(torch.ones(width))
        self.output_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x + self.stream_bias) * self.stream_scale + (y + self.output_bias) * self.output_scale


class Block(nn.Module):
    def __init__(
        self,
        width: int,
        mixer: Mixer,
        ffn: FFN | ContextualFFN,
        norm_eps: float,
        config: BlockConfig,
        placement: Placement,
    ):
        super().__init__()
        _check(ffn, config, placement)
        before, after = placement != "post", placement != "pre"

        def norm(wanted: bool) -> RMSNorm | None:
            return RMSNorm(width, norm_eps, config.zero_centered_norms) if wanted else None

        self.mixer_norm = norm(before)
        self.mixer = mixer
        self.mixer_out_norm = norm(after)
        # A stack that owns its residual (Hourglass) brings its own norms; parallel sublayers share the mixer's.
        self.ffn_norm = norm(before and not ffn.owns_residual and not config.parallel)
        self.ffn = ffn
        self.ffn_out_norm = norm(after and not ffn.owns_residual)
        self.mixer_merge = ResidualScaling(width) if config.residual_scaling else None
        self.ffn_merge = ResidualScaling(width) if config.residual_scaling else None
        self.parallel = config.parallel

    def forward(
        self, x: Tensor, sequence: SequenceContext, cache: LayerCache | None = None, carry: Carry | None = None
    ) -> tuple[Tensor, Carry]:
        """x [B, T, D] -> ([B, T, D], the carry for the next layer)."""
        carry = carry or Carry()
        h = _apply(self.mixer_norm, x)
        mixed = _apply(self.mixer_out_norm, self.mixer(h, sequence, None if cache is None else cache.mixer))
        if self.parallel:
            y, carry = self._ffn(h, sequence, cache, carry)
            return x + mixed + _apply(self.ffn_out_norm, y), carry
        x = _merge(self.mixer_merge, x, mixed)
        y, carry = self._ffn(_apply(self.ffn_norm, x), sequence, cache, carry)
        if self.ffn.owns_residual:
            return y, carry
        return _merge(self.ffn_merge, x, _apply(self.ffn_out_norm, y)), carry

    def _ffn(
        self, x: Tensor, sequence: SequenceContext, cache: LayerCache | None, carry: Carry
    ) -> tuple[Tensor, Carry]:
        if isinstance(self.ffn, ContextualFFN):
            return self.ffn(x, sequence, None if cache is None else cache.ffn, carry)
        return self.ffn(x), carry


def _apply(norm: RMSNorm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _merge(merge: ResidualScaling | None, x: Tensor, y: Tensor) -> Tensor:
    return x + y if merge is None else merge(x, y)


def _check(ffn: Sublayer, config: BlockConfig, placement: Placement) -> None:
    own = type(ffn).__name__
    require(
        not (ffn.owns_residual and config.parallel),
        f"block.parallel: {own} adds its own residual and cannot run beside the mixer; use another FFN",
    )
    require(
        not (ffn.owns_residual and config.residual_scaling),
        f"block.residual_scaling: {own} adds its own residual, which cannot be scaled; use another FFN",
    )
    require(
        not (ffn.owns_residual and placement == "post"),
        f"block.norm = post: {own} brings norms before its parts; use pre or peri",
    )
    require(
        not (config.parallel and (config.residual_scaling or placement == "post")),
        "block.parallel goes with norm pre or peri and without residual_scaling",
    )
