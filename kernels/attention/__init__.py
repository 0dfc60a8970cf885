"""Softmax attention: causal or full, grouped-query, sliding-window, packed, with a key-value cache.

    o_i = sum_j softmax_j(scale * q_i . k_j) v_j      over the keys j that query i sees

Source: Vaswani et al. 2017 (1706.03762); grouped queries: Ainslie et al. 2023 (2305.13245); windows: Beltagy et al.
2020 (2004.05150).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import Form, Request, choose
from kernels.packing import check_cu_seqlens

__all__ = ["FORMS", "attention"]

FORMS = (
    Form("chunked", "kernels.attention.chunked", "attention"),
    Form("reference", "kernels.attention.reference", "attention"),
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """Attention of T queries over S keys.

    Args:
        q: [B, T, H, K].
        k: [B, S, HKV, K]; H is a multiple of HKV and query head h reads key-value head h // (H // HKV).
        v: [B, S, HKV, V].
        scale: factor on the scores; K ** -0.5 by default.
        causal: a query sees only keys at its own position or before. The queries are the last T of the S positions, so
            S > T is decoding with a cache.
        window: number of keys that a query sees, itself included (causal only); None for all.
        cu_seqlens: int32 [N+1], where each of N sequences packed in one row (B = 1) begins, then T. No query sees
            another sequence.
        cu_seqlens_k: the same for the keys, when packed sequences have more keys than queries (a cache); cu_seqlens by
            default.

    Returns o [B, T, H, V] in q's dtype. Scores and softmax are accumulated in fp32 (fp64 for fp64 inputs); autocast
    changes nothing.

    Raises ValueError for shapes, dtypes or offsets that do not fit, naming the argument.
    """
    _check_tensors(q, k, v)
    B, T, H, K = q.shape
    S, V = k.shape[1], v.shape[3]
    if window is not None:
        if not causal:
            raise ValueError("window needs causal=True: a sliding window is defined by the keys before a query")
        if window < 1:
            raise ValueError(f"window must be at least 1 (it counts the query's own position), got {window}")
    if cu_seqlens is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k needs cu_seqlens: pass both, or neither for rows of one sequence each")
        if causal and S < T:
            raise ValueError(
                f"k has {S} positions and q has {T}: causal queries are the last of the keys, so S >= T must hold"
            )
    else:
        _check_offsets(q, k, cu_seqlens, cu_seqlens_k, causal)
    request = Request(
        op="attention",
        device=q.device,
        dtype=q.dtype,
        shape={"B": B, "T": T, "S": S, "H": H, "HKV": k.shape[2], "K": K, "V": V},
        options={"causal": causal, "window": window, "packed": cu_seqlens is not None},
    )
    form = choose(FORMS, request).load()
    # Scores follow the dtype of q, not the ambient autocast: fp32 inputs are attended in fp32.
    with torch.autocast(q.device.type, enabled=False):
        return form(
            q,
            k,
            v,
            scale=K**-0.5 if scale is None else scale,
            causal=causal,
            window=window,
            cu_seqlens=cu_seqlens,
            cu_seqlens_k=cu_seqlens if cu_seqlens_k is None else cu_seqlens_k,
        )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dims [batch, time, heads, head dim], got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}: convert one of them")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k {tuple(k.shape)} must share the batch and head dim of q {tuple(q.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v {tuple(v.shape)} must share batch, time and heads with k {tuple(k.shape)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads, which must divide the {q.shape[2]} heads of q")


def _check_offsets(q: Tensor, k: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, causal: bool) -> None:
    if cu_seqlens_k is None and k.shape[1] != q.shape[1]:
        raise ValueError(f"cu_seqlens_k is needed when k has {k.shape[1]} positions and q has {q.shape[1]}")
    check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1], q.device)
    if cu_seqlens_k is not None:
        try:
            check_cu_seqlens(cu_seqlens_k, k.shape[0], k.shape[1], k.device)
        except ValueError as error:
            raise ValueError(f"cu_seqlens_k: {error}") from None
        if cu_seqlens_k.numel() != cu_seqlens.numel():
            raise ValueError(f"cu_seqlens_k has {cu_seqlens_k.numel()} offsets, cu_seqlens has {cu_seqlens.numel()}")
        if causal and cu_seqlens_k.device.type == "cpu" and bool((cu_seqlens_k.diff() < cu_seqlens.diff()).any()):
            raise ValueError(
                "cu_seqlens_k gives a sequence fewer keys than queries: causal queries are the last of the keys"
            )
