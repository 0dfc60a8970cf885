"""One token of the short convolution, for generation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def short_convolution_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> tuple[Tensor, Tensor]:
    """One step of `short_convolution`.

    x [B, D]; state [B, D, W-1], the W-1 inputs before this token, oldest first (as the long form returns it);
    weight [D, W]; bias [D] or None; activation None or "silu".

    Returns y [B, D] in x's dtype and the next state [B, D, W-1] (a new tensor; the old one is left as it was).
    Raises ValueError naming the argument that does not fit.
    """
    if x.dim() != 2:
        raise ValueError(f"x must be [B, D], got {tuple(x.shape)}")
    B, D = x.shape
    if weight.dim() != 2 or weight.shape[0] != D:
        raise ValueError(f"weight must be [D, W] with D={D}, got {tuple(weight.shape)}")
    if state.shape != (B, D, weight.shape[1] - 1):
        raise ValueError(f"state must be [B, D, W-1] = {(B, D, weight.shape[1] - 1)}, got {tuple(state.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f'activation must be None or "silu", got {activation!r}')
    dtype = torch.promote_types(x.dtype, torch.float32)
    window = torch.cat([state.to(x.dtype), x.unsqueeze(-1)], dim=-1)  # [B, D, W]
    z = (window.to(dtype) * weight.to(dtype)).sum(-1)
    if bias is not None:
        z = z + bias.to(dtype)
    if activation == "silu":
        z = F.silu(z)
    return z.to(x.dtype), window[..., 1:]
