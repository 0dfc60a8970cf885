"""RMSNorm as a module around the kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels import rms_norm


class RMSNorm(nn.Module):
    """x [..., D] -> x / rms(x) * weight; statistics in fp32."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
