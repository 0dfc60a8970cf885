"""The definition of CCA's queries and keys, one sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.packing import sequence_bounds


def cca_reference(
    z: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    grouped: Tensor,
    grouped_bias: Tensor,
    factor: Tensor,
    *,
    eps: float = 1e-12,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.cca.cca`."""
    B, T, C = z.shape
    J, _, d = grouped.shape
    HKV = factor.numel()
    W0, W1 = depthwise.shape[1], grouped.shape[1] // d
    wide = torch.promote_types(z.dtype, torch.float32)
    depthwise, depthwise_bias, grouped, grouped_bias, factor = (
        parameter.to(wide) for parameter in (depthwise, depthwise_bias, grouped, grouped_bias, factor)
    )
    convolved = []
    for n, (row, start, end) in enumerate(sequence_bounds(cu_seqlens, B, T)):
        tokens = z[row, start:end].to(wide)
        past = tokens.new_zeros(W0 + W1 - 2, C) if initial_state is None else initial_state[n].to(z.dtype).to(wide)
        seen = torch.cat((past, tokens))
        count = end - start + W1 - 1
        u = depthwise_bias + sum(seen[i : i + count] * depthwise[:, i] for i in range(W0))
        s = grouped_bias.expand(end - start, C).unflatten(-1, (J, d))
        for i in range(W1):
            tap = u[i : i + end - start].unflatten(-1, (J, d))
            s = s + torch.einsum("tji,jio->tjo", tap, grouped[:, i * d : (i + 1) * d])
        convolved.append(s)
    sq, sk = torch.cat(convolved).view(B, T, J, d).split((J - HKV, HKV), dim=2)
    q0, k0 = z.to(wide).unflatten(-1, (J, d)).split((J - HKV, HKV), dim=2)
    groups = q0.unflatten(2, (HKV, -1))
    q = sq + ((groups + k0[:, :, :, None]) / 2).flatten(2, 3)
    k = sk + (groups.mean(dim=3) + k0) / 2
    q = q * (q.square().sum(-1, keepdim=True) + eps).rsqrt()
    k = k * (k.square().sum(-1, keepdim=True) + eps).rsqrt() * factor[:, None]
    return q.to(z.dtype), k.to(z.dtype)
