"""In what dtypes the delta rule computes."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of states, decays, gates and everything elementwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_dtype(q: Tensor) -> torch.dtype:
    """Of the operands of matrix products: bf16 for bf16 inputs where the processor multiplies it faster than fp32.

    fp16 is widened: sums of a chunk can leave its range.
    """
    if q.dtype == torch.bfloat16 and (q.device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return torch.bfloat16
    return accumulation_dtype(q.dtype)
