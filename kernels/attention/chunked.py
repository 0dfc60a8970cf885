"""Attention through torch's scaled_dot_product_attention, without ever building a mask over a packed row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.attention.reference import visible


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
        return _rows(q, k, v, scale, causal, window)
    assert cu_seqlens_k is not None
    return _packed(q, k, v, scale, causal, window, cu_seqlens, cu_seqlens_k)


def _rows(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None) -> Tensor:
    T, S = q.shape[1], k.shape[1]
    if window is not None and window >= S:
        window = None
    mask = None
    # torch's is_causal aligns the first query with the first key, so it serves only S == T. One query sees every key.
    plain_causal = causal and window is None and S == T
    if causal and not plain_causal and not (T == 1 and window is None):
        mask = visible(T, S, causal, window, q.device)
    o = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=plain_causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
) -> Tensor:
    lengths, lengths_k = cu_seqlens.diff().tolist(), cu_seqlens_k.diff().tolist()
    # split has one backward for all pieces (a concatenation); slices would each write a gradient of the whole row.
    qs, ks, vs = q.split(lengths, 1), k.split(lengths_k, 1), v.split(lengths_k, 1)
    groups: dict[tuple[int, int], list[int]] = {}
    for i, shape in enumerate(zip(lengths, lengths_k)):
        groups.setdefault(shape, []).append(i)
    pieces: list[Tensor] = [q] * len(lengths)
    for members in groups.values():
        batch = [torch.cat([x[i] for i in members]) for x in (qs, ks, vs)]
        o = _rows(batch[0], batch[1], batch[2], scale, causal, window)
        for i, piece in zip(members, o.split(1)):
            pieces[i] = piece
    return torch.cat(pieces, dim=1)
