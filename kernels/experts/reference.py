"""The definition of the routed feed-forward: a loop over experts and choices."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.experts.activations import ACTIVATIONS


def experts(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, scores: Tensor, *, activation: str) -> Tensor:
    """y [N, D]; see kernels.experts.experts. Computed in fp32 or wider, then rounded to x's dtype."""
    act = ACTIVATIONS[activation].forward
    wide = torch.promote_types(x.dtype, torch.float32)
    tokens = x.to(wide)
    y = torch.zeros_like(tokens)
    for e in range(down.shape[0]):
        gate, up = (tokens @ gate_up[e].to(wide)).chunk(2, dim=-1)
        out = (act(gate) * up) @ down[e].to(wide)
        for j in range(indices.shape[1]):
            chosen = (indices[:, j] == e)[:, None]
            # where, not a product with zero: a token that did not choose this expert must not see its infinities.
            y = y + torch.where(chosen, scores[:, j, None].to(wide) * out, 0.0)
    return y.to(x.dtype)
