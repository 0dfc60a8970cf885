"""The definition of SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """See `kernels.swiglu.swiglu`."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)
