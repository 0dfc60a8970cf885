"""Packed sequences in one call on a GPU, through torch's variable-length flash attention where this torch has one that fits."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _parameters() -> frozenset[str]:
    """Keyword parameters of torch's varlen_attn, which grew them over releases; empty where it is absent."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def serves(q: Tensor, v: Tensor) -> bool:
    """True when torch's kernel can do the whole packed row: half precision on a GPU, and one head width for q, k and v."""
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[3] == v.shape[3]
        and {"scale", "window_size"} <= _parameters()
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
) -> Tensor:
    """o [1, T, H, V]. The row's length bounds the longest sequence, so that nothing is read back from the GPU."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {
        "scale": scale,
        "window_size": (-1 if window is None else window - 1, 0 if causal else -1),
    }
    if q.shape[2] != k.shape[2]:
        if "enable_gqa" in _parameters():
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    offsets = (cu_seqlens.to(torch.int32), cu_seqlens_k.to(torch.int32))
    o = varlen_attn(q[0], k[0], v[0], *offsets, q.shape[1], k.shape[1], **options)
    assert isinstance(o, Tensor)  # a pair only when auxiliary outputs are asked for
    return o[None]
