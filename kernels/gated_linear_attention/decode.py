"""One token of gated linear attention, for generation."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One step of `gated_linear_attention`: S = Diag(exp(g)) S + k vᵀ, o = scale · Sᵀ q.

    q, k [B, H, K]; v [B, HV, V]; g None, [B, HV] or [B, HV, K]; state [B, HV, K, V]; scale default K ** -0.5.

    Returns o [B, HV, V] in v's dtype and the next state in fp32 at least (a new tensor; the old one is left as it was).
    Raises ValueError naming the argument that does not fit.
    """
    if q.dim() != 3 or k.shape != q.shape:
        raise ValueError(f"q and k must both be [B, H, K], got {tuple(q.shape)} and {tuple(k.shape)}")
    B, H, K = q.shape
    if v.dim() != 3 or v.shape[0] != B or v.shape[1] % H:
        raise ValueError(f"v must be [B, HV, V] with B={B} and HV a multiple of {H}, got {tuple(v.shape)}")
    HV, V = v.shape[1:]
    if state.shape != (B, HV, K, V):
        raise ValueError(f"state must be [B, HV, K, V] = {(B, HV, K, V)}, got {tuple(state.shape)}")
    if g is not None and g.shape not in ((B, HV), (B, HV, K)):
        raise ValueError(f"g must be {(B, HV)} or {(B, HV, K)}, got {tuple(g.shape)}")
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        query = q.to(wide).repeat_interleave(HV // H, dim=1) * (K**-0.5 if scale is None else scale)
        key = k.to(wide).repeat_interleave(HV // H, dim=1)
        state = state.to(wide)
        if g is not None:
            decay = g.to(wide).exp()
            state = state * (decay[..., None] if g.dim() == 3 else decay[..., None, None])
        state = state + key[..., None] * v.to(wide)[..., None, :]
        o = torch.matmul(query[..., None, :], state).squeeze(-2)
    return o.to(v.dtype), state
