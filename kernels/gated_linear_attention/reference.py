"""The definition of gated linear attention: the recurrence, one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.packing import sequence_bounds


def gated_linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.gated_linear_attention.gated_linear_attention`. Computes in fp32 at least."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    scale = K**-0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = (q.to(wide) * scale).repeat_interleave(HV // H, dim=2)
    keys = k.to(wide).repeat_interleave(HV // H, dim=2)
    values = v.to(wide)
    if g is None:
        decay = torch.ones(B, T, HV, 1, dtype=wide, device=q.device)
    else:
        decay = g.to(wide).exp() if g.dim() == 4 else g.to(wide).exp()[..., None]
    outputs, states = [], []
    for n, (row, start, end) in enumerate(sequence_bounds(cu_seqlens, B, T)):
        state = queries.new_zeros(HV, K, V) if initial_state is None else initial_state[n].to(wide)
        for t in range(start, end):
            state = decay[row, t, :, :, None] * state + keys[row, t, :, :, None] * values[row, t, :, None, :]
            outputs.append((queries[row, t, :, :, None] * state).sum(1))
        states.append(state)
    o = torch.stack(outputs).reshape(B, T, HV, V).to(v.dtype)
    return o, torch.stack(states) if output_final_state else None
