"""e^x on CPUs where the vendor's vector library is slow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.common import products

LOG2E = math.log2(math.e)


def exp_(x: Tensor) -> Tensor:
    """e^x in place.

    torch.exp in fp32 is MKL's, which takes four times as long as torch's own 2^x on the processors whose products it is slow
    with, too. The exponent is rounded once more there: 4e-6 of the result at x = -60, nothing near 0.
    """
    slow = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
    if slow and products.in_use() == "onednn":
        return x.mul_(LOG2E).exp2_()
    return x.exp_()
