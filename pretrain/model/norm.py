"""RMSNorm as a module around the kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """x [..., D] -> x / rms(x) * weight, in the weight's dtype; statistics in fp32.

    zero_centered: the weight is kept as its difference from 1 (as in Gemma and Qwen3-Next), so that weight decay pulls
    the scale towards 1.
    """

    def __init__(self, width: int, eps: float = 1e-6, zero_centered: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if zero_centered else torch.ones(width))
        self.eps, self.zero_centered = eps, zero_centered

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x; with a residual (the norm of their sum, their sum), in one pass."""
        weight = 1.0 + self.weight if self.zero_centered else self.weight
        if residual is None:
            return rms_norm(x, weight, self.eps).to(self.weight.dtype)
        normed, total = add_rms_norm(x, residual, weight, self.eps)
        return normed.to(self.weight.dtype), total


def norm_of_part(x: Tensor, weight: Tensor, eps: float, width: int, across: Callable[[Tensor], Tensor]) -> Tensor:
    """RMS norm over `width` channels of which x [..., C] and weight [C] are a part; across: sums [..., 1] over the parts."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        h = x.to(wide)
        square = across(h.square().sum(-1, keepdim=True)) / width
        return (h * torch.rsqrt(square + eps) * weight.to(wide)).to(x.dtype)
