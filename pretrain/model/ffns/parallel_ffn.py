"""Parallel FFNs computed as one wide SwiGLU: the form that FFN Fusion (arXiv 2503.18908) gives a run of FFN layers.

    y = sum_i SwiGLU_i(s_i * x),   x normalised without a scale, s_i [D] the scale of FFN i's own norm

The sum of m gated units is one gated unit: gate and up stacked along the hidden dim, down along its input, each scale folded
into the columns of its gate and up. So m consecutive FFN layers whose attention was removed, x + f_1(x) + f_2(x + f_1(x)) + ...,
become one layer x + f_1(x) + ... + f_m(x): an approximation of the sequence, but exactly this sublayer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pretrain.model.ffns.glu import gated
from pretrain.model.ffns.swiglu import SwiGLU
from pretrain.model.split import Section, Split, columns, rows
from pretrain.model.sublayer import FFN, FFNConfig, linear_flops


class ParallelFFNConfig(FFNConfig):
    kind: Literal["fused"] = "fused"
    hidden: int = Field(ge=1)
    """Hidden width of each FFN."""
    parts: int = Field(2, ge=1)
    """FFNs side by side."""

    def build(self, width: int) -> ParallelFFN:
        return ParallelFFN(width, self.hidden, self.parts)


class ParallelFFN(FFN):
    """gate_up.weight [2 m F, D]: the gates of FFN 1 .. m, then their ups; down.weight [D, m F]; scale [m D]."""

    def __init__(self, width: int, hidden: int, parts: int):
        super().__init__()
        self.parts, self.hidden = parts, hidden
        # Kept flat: norm scales are vectors, and vectors do not decay.
        self.scale = nn.Parameter(torch.ones(parts * width))
        self.gate_up = nn.Linear(width, 2 * parts * hidden, bias=False)
        self.down = nn.Linear(parts * hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gated(functional.linear(x, self._folded()), "silu"))

    def _folded(self) -> Tensor:
        """gate_up.weight with every FFN's scale on its columns: cheaper than m scaled copies of the tokens."""
        weight = self.gate_up.weight
        scale = self.scale.view(self.parts, 1, -1)
        return (weight.view(2, self.parts, self.hidden, -1) * scale).view_as(weight)

    @torch.no_grad()
    def fused(self) -> SwiGLU:
        """The same function as a plain SwiGLU, its weights copied."""
        plain = SwiGLU(self.down.out_features, self.parts * self.hidden).to(self.down.weight)
        plain.gate_up.weight.copy_(self._folded())
        plain.down.weight.copy_(self.down.weight)
        return plain

    def flops_per_token(self, context: float) -> float:
        return linear_flops(self.gate_up.weight, self.down.weight)

    def output_projections(self) -> list[Tensor]:
        return [self.down.weight]

    def splits(self) -> dict[str, Split]:
        each = [Section.even(self.hidden, "hidden")] * self.parts
        return rows(self.gate_up, "gate_up", *each, *each) | columns("down", *each)

    def shrink(self, rank: int, ranks: int) -> None:
        self.hidden //= ranks


@torch.no_grad()
def fuse(parts: Sequence[tuple[Tensor, SwiGLU]]) -> SwiGLU:
    """One SwiGLU g with g(n) = sum_i f_i(s_i * n) for (s_i [D], f_i) in parts; hidden widths may differ.

    To fuse pre-norm layers pass each norm's scale (1 + weight where norms are zero-centered) and give the fused layer a norm of
    weight one: the norms must share their eps. Raises ValueError for parts that do not fit together.
    """
    if not parts:
        raise ValueError("fuse needs at least one (scale, SwiGLU)")
    width = parts[0][1].down.out_features
    for index, (scale, ffn) in enumerate(parts):
        if ffn.down.out_features != width or scale.shape != (width,):
            raise ValueError(
                f"part {index}: scale {tuple(scale.shape)} and a SwiGLU of width {ffn.down.out_features}; "
                f"all parts must have the first one's width, {width}"
            )
    gates, ups = zip(*((ffn.gate_up.weight * scale).chunk(2) for scale, ffn in parts))
    fused = SwiGLU(width, sum(ffn.down.in_features for _, ffn in parts)).to(gates[0])
    fused.gate_up.weight.copy_(torch.cat((*gates, *ups)))
    fused.down.weight.copy_(torch.cat([ffn.down.weight for _, ffn in parts], dim=1))
    return fused
