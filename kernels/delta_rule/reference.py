"""The delta rule as it is defined: one token after the other. Slow, any dtype, gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.packing import sequence_bounds


def delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    normalize_qk: bool,
) -> tuple[Tensor, Tensor | None]:
    """The meaning of `kernels.delta_rule.delta_rule`; same arguments, already validated."""
    with torch.autocast(q.device.type, enabled=False):
        accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
        groups = v.shape[2] // q.shape[2]
        q, k, values, beta = (x.to(accumulate) for x in (q, k, v, beta))
        if normalize_qk:
            q, k = unit_length(q), unit_length(k)
        q, k = (x.repeat_interleave(groups, dim=2) for x in (q * scale, k))
        decay = torch.ones_like(beta) if g is None else g.to(accumulate).exp()
        if decay.dim() == 3:
            decay = decay[..., None]

        outputs, states = [], []
        for n, (row, start, end) in enumerate(sequence_bounds(cu_seqlens, q.shape[0], q.shape[1])):
            if initial_state is None:
                state = k.new_zeros(k.shape[2], k.shape[3], values.shape[3])
            else:
                state = initial_state[n].to(accumulate)
            for t in range(start, end):
                state = state * decay[row, t, :, :, None]
                error = values[row, t] - torch.einsum("hkv,hk->hv", state, k[row, t])
                state = state + torch.einsum("hk,hv->hkv", k[row, t], beta[row, t, :, None] * error)
                outputs.append(torch.einsum("hkv,hk->hv", state, q[row, t]))
            states.append(state)
        # Sequences came in the order of their tokens, row by row.
        o = torch.stack(outputs).view(values.shape).to(v.dtype)
        return o, torch.stack(states) if output_final_state else None


def unit_length(x: Tensor) -> Tensor:
    """x [..., K] scaled to length 1; the 1e-6 keeps a zero row zero and its gradient finite."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
