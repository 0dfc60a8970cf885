"""One token of the delta rule: what generation calls between prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.delta_rule.reference import unit_length


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor,
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
) -> tuple[Tensor, Tensor]:
    """Advances every row by one token; the recurrence and the arguments are those of `delta_rule`, without T.

    q, k [B, H, K]; v [B, HV, V]; beta [B, HV]; g None, [B, HV] or [B, HV, K]; state [B, HV, K, V] fp32 (fp64 for fp64
    inputs). Returns o [B, HV, V] in v's dtype and the new state. Without gradients the given state is updated in place
    and returned, so that generation holds one copy; where autograd records, a new tensor is returned.
    Raises ValueError for a wrong shape.
    """
    B, HV, K = _validate(q, k, v, beta, g, state)[:3]
    with torch.autocast(q.device.type, enabled=False):
        groups = HV // q.shape[1]
        queries, keys, values, strength = (x.to(state.dtype) for x in (q, k, v, beta))
        if normalize_qk:
            queries, keys = unit_length(queries), unit_length(keys)
        queries = (queries * (K**-0.5 if scale is None else scale)).repeat_interleave(groups, dim=1)
        keys = keys.repeat_interleave(groups, dim=1)
        recording = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (q, k, v, beta, g, state)
        )
        new = state.clone() if recording else state
        if g is not None:
            new.mul_(g.to(state.dtype).exp().reshape(B, HV, -1, 1))
        error = values - (keys[:, :, None] @ new)[:, :, 0]
        writes = keys[..., None] * (strength[..., None] * error)[:, :, None]
        # The in-place sum would overwrite what autograd keeps of the product above.
        new = new + writes if recording else new.add_(writes)
        o = (queries[:, :, None] @ new)[:, :, 0]
        return o.to(v.dtype), new


def _validate(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor
) -> tuple[int, int, int, int]:
    if state.dim() != 4:
        raise ValueError(f"state must be [B, HV, K, V], got {list(state.shape)}")
    B, HV, K, V = state.shape
    H = q.shape[1] if q.dim() == 3 else 0
    if not H or HV % H or tuple(q.shape) != (B, H, K):
        raise ValueError(f"q must be [{B}, H, {K}] with H a divisor of the state's {HV} heads, got {list(q.shape)}")
    wanted = {"k": (k, (B, H, K)), "v": (v, (B, HV, V)), "beta": (beta, (B, HV))}
    if g is not None:
        wanted["g"] = (g, (B, HV, K) if g.dim() == 3 else (B, HV))
    for name, (x, shape) in wanted.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}")
    return B, HV, K, V
