"""The definition of the short convolution: a loop over sequences, tokens and taps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packing import sequence_bounds


def short_convolution_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.short_conv.short_convolution`. Computes in fp32 at least and rounds once at the end."""
    B, T, D = x.shape
    W = weight.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    taps = weight.to(dtype)
    outputs, states = [], []
    for n, (row, start, end) in enumerate(sequence_bounds(cu_seqlens, B, T)):
        past = x.new_zeros(D, W - 1) if initial_state is None else initial_state[n].to(x.dtype)
        inputs = torch.cat([past.t(), x[row, start:end]])  # token t of the sequence is row t + W - 1
        for t in range(end - start):
            z = torch.zeros(D, dtype=dtype, device=x.device) if bias is None else bias.to(dtype)
            for i in range(W):
                z = z + taps[:, i] * inputs[t + i].to(dtype)
            outputs.append(z)
        states.append(inputs[end - start :].t())
    y = torch.stack(outputs).reshape(B, T, D) if outputs else x.to(dtype)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), torch.stack(states) if output_final_state else None
