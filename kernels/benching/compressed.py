"""The workload of compressed convolutional attention's queries and keys. A shape's H are the query heads.

Below it, what plain torch offers in its place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.benching.shapes import Inputs, Shape, Workload, finish, generator_of, normal

GROUP = 4  # query heads that share a key head, where the heads allow it
TAPS = 2


def _projections(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Parameters in fp32, as they are trained. Taps are scaled to keep the size of what they are given."""
    generator = generator_of(device)
    H, d = shape.H, shape.K
    keys = H // GROUP if H % GROUP == 0 else H
    heads, C = H + keys, (H + keys) * d
    return finish(
        {
            "z": normal((shape.B, shape.T, C), device, generator).to(dtype),
            "depthwise": normal((C, TAPS), device, generator) * TAPS**-0.5,
            "depthwise_bias": normal((C,), device, generator) / 4,
            "grouped": normal((heads, TAPS * d, d), device, generator) * (TAPS * d) ** -0.5,
            "grouped_bias": normal((C,), device, generator) / 4,
            "factor": torch.ones(keys, device=device),
        }
    )


def _call(inputs: Inputs) -> Tensor:
    from kernels.cca import cca

    q, k, _ = cca(**inputs)
    return torch.cat((q, k), dim=2)


def convolutions(i: Inputs) -> Tensor:
    """Two convolutions of torch, the means and the norms, under autograd."""
    z, factor = i["z"], i["factor"]
    heads, rows, d = i["grouped"].shape
    HKV = factor.numel()
    padded = F.pad(z.transpose(1, 2), (i["depthwise"].shape[1] + rows // d - 2, 0))
    u = F.conv1d(padded, i["depthwise"][:, None].to(z.dtype), i["depthwise_bias"].to(z.dtype), groups=z.shape[2])
    kernel = i["grouped"].unflatten(1, (-1, d)).permute(0, 3, 2, 1).flatten(0, 1).to(z.dtype)
    s = F.conv1d(u, kernel, i["grouped_bias"].to(z.dtype), groups=heads).transpose(1, 2).unflatten(-1, (-1, d))
    q0, k0 = z.unflatten(-1, (-1, d)).split((heads - HKV, HKV), dim=2)
    mean = (q0.unflatten(2, (HKV, -1)) + k0[:, :, :, None]) / 2
    q = F.normalize((s[:, :, : heads - HKV] + mean.flatten(2, 3)).float(), dim=-1)
    k = F.normalize((s[:, :, heads - HKV :] + mean.mean(dim=3)).float(), dim=-1) * factor[:, None]
    return torch.cat((q, k), dim=2).to(z.dtype)


WORKLOADS = (Workload("cca", "cca", _projections, _call),)
