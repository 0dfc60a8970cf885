"""One token of the selective scan, for generation."""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of `selective_scan`.

    x, dt [b, D]; A [D, N]; B, C [b, N]; D [D] or None; state [b, D, N].

    Returns y [b, D] in x's dtype and the next state in fp32 at least (a new tensor; the old one is left as it was).
    Raises ValueError naming the argument that does not fit.
    """
    if x.dim() != 2 or dt.shape != x.shape:
        raise ValueError(f"x and dt must both be [b, D], got {tuple(x.shape)} and {tuple(dt.shape)}")
    batch, channels = x.shape
    if A.dim() != 2 or A.shape[0] != channels:
        raise ValueError(f"A must be [D, N] with D={channels}, got {tuple(A.shape)}")
    N = A.shape[1]
    for name, tensor in (("B", B), ("C", C)):
        if tensor.shape != (batch, N):
            raise ValueError(f"{name} must be {(batch, N)}, got {tuple(tensor.shape)}")
    if state.shape != (batch, channels, N):
        raise ValueError(f"state must be {(batch, channels, N)}, got {tuple(state.shape)}")
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        u, step = x.to(wide), dt.to(wide)
        decay = torch.exp(step[..., None] * A.to(wide))
        state = decay * state.to(wide) + (step * u)[..., None] * B.to(wide)[:, None]
        y = (state * C.to(wide)[:, None]).sum(-1)
        if D is not None:
            y = y + D.to(wide) * u
    return y.to(x.dtype), state
