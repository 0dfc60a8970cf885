"""One layer: a mixer and an FFN around the residual stream, with the norms before them, after them, or both."""

from __future__ import annotations

from collections.abc import Iterator
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
    """mixer or ffn may be None: a layer with one sublayer only."""

    def __init__(
        self,
        width: int,
        mixer: Mixer | None,
        ffn: FFN | ContextualFFN | None,
        norm_eps: float,
        config: BlockConfig,
        placement: Placement = "pre",
    ):
        super().__init__()
        _check(mixer, ffn, config, placement)
        before, after = placement != "post", placement != "pre"

        def norm(wanted: bool) -> RMSNorm | None:
            return RMSNorm(width, norm_eps, config.zero_centered_norms) if wanted else None

        def merge(wanted: bool) -> ResidualScaling | None:
            return ResidualScaling(width) if wanted and config.residual_scaling else None

        self.parallel = config.parallel and mixer is not None and ffn is not None
        # A stack that owns its residual (Hourglass) brings its own norms; parallel sublayers share the mixer's.
        plain = ffn is not None and not ffn.owns_residual
        self.mixer_norm = norm(before and mixer is not None)
        self.mixer = mixer
        self.mixer_out_norm = norm(after and mixer is not None)
        self.mixer_merge = merge(mixer is not None)
        self.ffn_norm = norm(before and plain and not self.parallel)
        self.ffn = ffn
        self.ffn_out_norm = norm(after and plain)
        self.ffn_merge = merge(ffn is not None)

    def forward(
        self, x: Tensor, sequence: SequenceContext, cache: LayerCache | None = None, carry: Carry | None = None
    ) -> tuple[Tensor, Carry]:
        """x [B, T, D] -> ([B, T, D], the carry for the next layer)."""
        given = carry = carry or Carry()
        if self.parallel:
            assert self.mixer is not None and self.ffn is not None
            h = _apply(self.mixer_norm, x)
            mixed = self.mixer(h, sequence, None if cache is None else cache.mixer)
            y, carry = _call(self.ffn, h, sequence, cache, carry)
            return x + _apply(self.mixer_out_norm, mixed) + _apply(self.ffn_out_norm, y), carry.apart(given)
        if self.mixer is not None:
            mixed = self.mixer(_apply(self.mixer_norm, x), sequence, None if cache is None else cache.mixer)
            mixed = _apply(self.mixer_out_norm, mixed)
            if self.mixer_merge is None and self.ffn_norm is not None:
                h, x = self.ffn_norm(mixed, x)  # the addition and the norm after it in one pass
            else:
                x = _merge(self.mixer_merge, x, mixed)
                h = _apply(self.ffn_norm, x)
        else:
            h = _apply(self.ffn_norm, x)
        if self.ffn is not None:
            y, carry = _call(self.ffn, h, sequence, cache, carry)
            x = y if self.ffn.owns_residual else _merge(self.ffn_merge, x, _apply(self.ffn_out_norm, y))
        return x, carry.apart(given)

    def sublayers(self) -> Iterator[Sublayer]:
        """The mixer and the FFN, as far as there are such."""
        yield from (part for part in (self.mixer, self.ffn) if part is not None)


def _call(
    ffn: FFN | ContextualFFN, x: Tensor, sequence: SequenceContext, cache: LayerCache | None, carry: Carry
) -> tuple[Tensor, Carry]:
    if isinstance(ffn, ContextualFFN):
        return ffn(x, sequence, None if cache is None else cache.ffn, carry)
    return ffn(x), carry


def _apply(norm: RMSNorm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _merge(merge: ResidualScaling | None, x: Tensor, y: Tensor) -> Tensor:
    return x + y if merge is None else merge(x, y)


def _check(mixer: Mixer | None, ffn: FFN | ContextualFFN | None, config: BlockConfig, placement: Placement) -> None:
    assert mixer is not None or ffn is not None
    require(
        not (config.parallel and (config.residual_scaling or placement == "post")),
        "block.parallel goes with norm pre or peri and without residual_scaling",
    )
    if ffn is None or not ffn.owns_residual:
        return
    own = type(ffn).__name__
    require(
        not config.parallel,
        f"block.parallel: {own} adds its own residual and cannot run beside the mixer; use another FFN",
    )
    require(
        not config.residual_scaling,
        f"block.residual_scaling: {own} adds its own residual, which cannot be scaled; use another FFN",
    )
    require(placement != "post", f"block.norm = post: {own} brings norms before its parts; use pre or peri")
