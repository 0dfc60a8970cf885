"""One token of CCA's queries and keys, for generation."""

from __future__ import annotations

import torch
from torch import Tensor


def cca_step(
    z: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    grouped: Tensor,
    grouped_bias: Tensor,
    factor: Tensor,
    state: Tensor,
    *,
    eps: float = 1e-12,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of `kernels.cca.cca`.

    z [B, C]; state [B, R, C], the columns before this token, oldest first (as the long form returns it); parameters as there.
    Returns q [B, H, d] and k [B, HKV, d] in z's dtype, and the next state [B, R, C] (a new tensor).
    Raises ValueError where the state does not fit.
    """
    B, C = z.shape
    J, _, d = grouped.shape
    W0, W1, HKV = depthwise.shape[1], grouped.shape[1] // d, factor.numel()
    if state.shape != (B, W0 + W1 - 2, C):
        raise ValueError(f"state must be [B, W0 + W1 - 2, C] = {(B, W0 + W1 - 2, C)}, got {tuple(state.shape)}")
    wide = torch.promote_types(z.dtype, torch.float32)
    seen = torch.cat((state.to(z.dtype), z[:, None]), dim=1)
    windows = seen.to(wide).unfold(1, W0, 1)  # [B, W1, C, W0]
    u = (windows * depthwise.to(wide)).sum(-1) + depthwise_bias.to(wide)
    taps = u.to(z.dtype).unflatten(-1, (J, d)).permute(2, 0, 1, 3).flatten(2)  # [J, B, W1 d]
    with torch.autocast(z.device.type, enabled=False):
        s = torch.bmm(taps, grouped.to(z.dtype)).transpose(0, 1).to(wide) + grouped_bias.to(wide).view(J, d)
    now = z.to(wide).unflatten(-1, (J, d))
    groups, k0 = now[:, : J - HKV].unflatten(1, (HKV, -1)), now[:, J - HKV :]
    q = s[:, : J - HKV].unflatten(1, (HKV, -1)) + (groups + k0[:, :, None]) / 2
    k = s[:, J - HKV :] + (groups.mean(dim=2) + k0) / 2
    x = torch.cat((q.flatten(1, 2), k), dim=1)
    x = x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()
    q, k = x[:, : J - HKV], x[:, J - HKV :] * factor.to(wide)[:, None]
    return q.to(z.dtype), k.to(z.dtype), seen[:, 1:].clone()
