"""The definition of the selective scan: one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.packing import sequence_bounds


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.state_space.selective_scan`. Computes in fp32 at least."""
    batch, T, channels = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    u, step, rates, inputs, readout = (t.to(wide) for t in (x, dt, A, B, C))
    outputs, states = [], []
    for n, (row, start, end) in enumerate(sequence_bounds(cu_seqlens, batch, T)):
        h = u.new_zeros(channels, A.shape[1]) if initial_state is None else initial_state[n].to(wide)
        for t in range(start, end):
            decay = torch.exp(step[row, t, :, None] * rates)
            h = decay * h + (step[row, t] * u[row, t])[:, None] * inputs[row, t]
            outputs.append((h * readout[row, t]).sum(-1))
        states.append(h)
    y = torch.stack(outputs).reshape(batch, T, channels)
    if D is not None:
        y = y + D.to(wide) * u
    return y.to(x.dtype), torch.stack(states) if output_final_state else None
