"""The definition of attention: one sequence and one head at a time, every score written out."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(T: int, S: int, causal: bool, window: int | None, device: torch.device | None = None) -> Tensor:
    """Bool [T, S]: which keys each query sees, when the queries are the last T of S positions."""
    query = torch.arange(S - T, S, device=device)[:, None]
    key = torch.arange(S, device=device)[None, :]
    mask = torch.ones(T, S, dtype=torch.bool, device=device)
    if causal:
        mask &= key <= query
    if window is not None:
        mask &= key > query - window
    return mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    """o [B, T, H, V]; see kernels.attention.attention."""
    if cu_seqlens is None:
        rows = [_row(q[b], k[b], v[b], scale, causal, window) for b in range(q.shape[0])]
        return torch.stack(rows) if rows else q.new_zeros(*q.shape[:3], v.shape[3])
    assert cu_seqlens_k is not None
    starts, starts_k = cu_seqlens.tolist(), cu_seqlens_k.tolist()
    pieces = [
        _row(q[0, a:b], k[0, c:d], v[0, c:d], scale, causal, window)
        for a, b, c, d in zip(starts, starts[1:], starts_k, starts_k[1:])
    ]
    return torch.cat(pieces)[None]


def _row(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None) -> Tensor:
    """One sequence: q [T, H, K], k [S, HKV, K], v [S, HKV, V] -> [T, H, V]."""
    T, H, _ = q.shape
    S, HKV, V = v.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    mask = visible(T, S, causal, window, q.device)
    heads = []
    for h in range(H):
        kv = h // (H // HKV)
        scores = scale * (q[:, h].to(wide) @ k[:, kv].to(wide).T)
        weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)
        heads.append((weights @ v[:, kv].to(wide)).to(q.dtype))
    return torch.stack(heads, dim=1) if heads else q.new_zeros(T, H, V)
