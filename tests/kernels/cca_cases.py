"""Inputs of CCA's queries and keys, for the tests of its forms."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Sizes(NamedTuple):
    H: int
    HKV: int
    d: int
    W0: int
    W1: int

    @property
    def channels(self) -> int:
        return (self.H + self.HKV) * self.d

    @property
    def reach(self) -> int:
        return self.W0 + self.W1 - 2


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def parameters(sizes: Sizes, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """depthwise, its bias, grouped, its bias, factor."""
    H, HKV, d, W0, W1 = sizes
    C = sizes.channels
    shapes = ((C, W0), (C,), (H + HKV, W1 * d, d), (C,), (HKV,))
    scales = (W0**-0.5, 0.5, (W1 * d) ** -0.5, 0.5, 1.0)
    return [
        (draw(*shape, seed=seed) * scale).to(dtype) for seed, (shape, scale) in enumerate(zip(shapes, scales), start=10)
    ]


def values_and_gradients(
    form: Any,
    z: Tensor,
    parameters: list[Tensor],
    state: Tensor | None = None,
    borders: list[int] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """q, k and the gradients of everything, for gradients of q and k that are the same for every form."""
    leaves = [x.detach().clone().requires_grad_() for x in (z, *parameters)]
    before = None if state is None else state.detach().clone().requires_grad_()
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    q, k = form(*leaves, initial_state=before, cu_seqlens=cu_seqlens, **options)[:2]
    wanted = leaves + ([] if before is None else [before])
    # Representable in every dtype, so that all forms get the same.
    upstream = [
        draw(*y.shape, seed=seed, dtype=torch.bfloat16).to(torch.float16).to(y.dtype)
        for seed, y in enumerate((q, k), start=20)
    ]
    gradients = torch.autograd.grad([q, k], wanted, upstream, allow_unused=True, materialize_grads=True)
    names = ("z", "depthwise", "depthwise_bias", "grouped", "grouped_bias", "factor", "initial_state")
    return {"q": q.detach(), "k": k.detach(), **dict(zip(names, gradients))}


def by_convolutions(
    z: Tensor, parameters: list[Tensor], sizes: Sizes, borders: list[int] | None = None
) -> list[Tensor]:
    """q and k by torch's convolutions and norms, sequence by sequence, without states."""
    depthwise, depthwise_bias, grouped, grouped_bias, factor = parameters
    H, HKV, d, _, W1 = sizes
    kernel = grouped.unflatten(1, (W1, d)).permute(0, 3, 2, 1).flatten(0, 1)
    rows = [z] if borders is None else [z[:, a:b] for a, b in pairwise(borders) if b > a]
    queries, keys = [], []
    for row in rows:
        padded = F.pad(row.transpose(1, 2), (sizes.reach, 0))
        u = F.conv1d(padded, depthwise[:, None], depthwise_bias, groups=sizes.channels)
        s = F.conv1d(u, kernel, grouped_bias, groups=H + HKV).transpose(1, 2).unflatten(-1, (-1, d))
        heads = row.unflatten(-1, (-1, d))
        q0, k0 = heads[:, :, :H], heads[:, :, H:]
        mean = (q0 + k0.repeat_interleave(H // HKV, dim=2)) / 2
        q = s[:, :, :H] + mean
        k = s[:, :, H:] + mean.unflatten(2, (HKV, -1)).mean(dim=3)
        queries.append(F.normalize(q, dim=-1))
        keys.append(F.normalize(k, dim=-1) * factor[:, None])
    return [torch.cat(queries, dim=1), torch.cat(keys, dim=1)]
