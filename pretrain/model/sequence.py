"""What a sublayer needs to know about the rows it is given: where sequences begin, and each token's position."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class SequenceContext:
    """Borders and positions of one forward pass, shared by all layers.

    cu_seqlens: int32 [N+1], borders of packed sequences in the single row (B = 1), or None when each row is one sequence.
    positions: int64 [B, T], the position of each token within its own sequence.
    """

    positions: Tensor
    cu_seqlens: Tensor | None = None
    _rotary: dict[tuple[int, float], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, tokens: Tensor, cu_seqlens: Tensor | None, offset: int = 0) -> SequenceContext:
        """tokens [B, T]; offset: how many tokens of each row the caches already hold."""
        B, T = tokens.shape
        positions = torch.arange(offset, offset + T, device=tokens.device)
        if cu_seqlens is None:
            return cls(positions.expand(B, T))
        if B != 1:
            raise ValueError(f"cu_seqlens describes one packed row, but tokens has {B} rows; flatten them to [1, B*T]")
        if offset:
            raise ValueError("cu_seqlens cannot be combined with a cache that already holds tokens")
        starts = cu_seqlens[:-1].long()
        lengths = cu_seqlens[1:].long() - starts
        return cls((positions - torch.repeat_interleave(starts, lengths, output_size=T))[None], cu_seqlens)

    def rotary(self, dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """(cos, sin), each fp32 [B, T, 1, dim / 2], computed once per forward pass for all layers that agree on them."""
        key = (dim, theta)
        if key not in self._rotary:
            exponent = torch.arange(0, dim, 2, device=self.positions.device, dtype=torch.float32) / dim
            angles = self.positions[..., None].float() * (1.0 / theta**exponent)
            self._rotary[key] = (angles.cos()[:, :, None], angles.sin()[:, :, None])
        return self._rotary[key]
