"""The definition of the routed feed-forward: a loop over experts and choices."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.experts.activations import ACTIVATIONS


def experts(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, scores: Tensor, *, activation: str) -> Tensor:
    """y [N, D]; see kernels.experts.experts. Computed in fp32 or wider, then rounded to x's dtype."""
    act = ACTIVATIONS[activation].forward
    gated = gate_up.shape[2] != down.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    tokens = x.to(wide)
    y = torch.zeros_like(tokens)
    for e in range(down.shape[0]):
        hidden = tokens @ gate_up[e].to(wide)
        if gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = act(gate) * up
        else:
            hidden = act(hidden)
        out = hidden @ down[e].to(wide)
        for j in range(indices.shape[1]):
            chosen = (indices[:, j] == e)[:, None]
            # where, not a product with zero: a token that did not choose this expert must not see its infinities.
            y = y + torch.where(chosen, scores[:, j, None].to(wide) * out, 0.0)
    return y.to(x.dtype)
