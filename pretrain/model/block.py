"""One layer: x + mixer(norm(x)), then x + ffn(norm(x)) (pre-norm)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pretrain.model.norm import RMSNorm
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import FFN, Mixer


class Block(nn.Module):
    def __init__(self, width: int, mixer: Mixer, ffn: FFN, norm_eps: float):
        super().__init__()
        self.mixer_norm = RMSNorm(width, norm_eps)
        self.mixer = mixer
        # A stack that owns its residual (Hourglass) also brings its own norms.
        self.ffn_norm = None if ffn.owns_residual else RMSNorm(width, norm_eps)
        self.ffn = ffn

    def forward(self, x: Tensor, sequence: SequenceContext, cache: dict[str, Any] | None = None) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), sequence, cache)
        if self.ffn_norm is None:
            return self.ffn(x)
        return x + self.ffn(self.ffn_norm(x))
