"""The fast torch form of attention: torch's fused scaled_dot_product_attention, given only scores that matter.

No mask is ever built over a packed row: sequences of one length are one call, on a GPU all sequences are. A sliding window
becomes a band of blocks of queries, each over the keys that it may see.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from kernels.attention import varlen, wide
from kernels.attention.reference import visible

BAND = 256  # queries in a block of the band: its share of scores that nobody sees is BAND / (window + BAND)
WIDENED_KEYS = 192  # on a CPU, training over fewer keys is faster in fp32 than in bf16; torch changes its blocks there


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
    if varlen.serves(q, v):
        return varlen.attention(q, k, v, scale, causal, window, cu_seqlens, cu_seqlens_k)
    return _packed(q, k, v, scale, causal, window, cu_seqlens, cu_seqlens_k)


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
    """A call for the sequences of each length; where all have one, as rows of a batch do, nothing is copied.

    Measured on a CPU for a row of 4096 tokens: padding sequences to common lengths costs 7 to 9 times more at worst than a
    call a sequence, a mask over the whole row 8 times more.
    """
    lengths, lengths_k = ([b - a for a, b in pairwise(x.tolist())] for x in (cu_seqlens, cu_seqlens_k))
    if len(set(zip(lengths, lengths_k))) == 1:
        row_q, row_k, row_v = (
            x.squeeze(0).unflatten(0, (len(each), each[0]))
            for x, each in ((q, lengths), (k, lengths_k), (v, lengths_k))
        )
        return _rows(row_q, row_k, row_v, scale, causal, window).flatten(0, 1).unsqueeze(0)
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


def _rows(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None) -> Tensor:
    """One sequence a row: q [B, T, H, K], k [B, S, HKV, K], v [B, S, HKV, V] -> [B, T, H, V]."""
    T, S = q.shape[1], k.shape[1]
    if window is not None and T + window <= S:
        # Keys before the first query's window.
        S = T + window - 1
        k, v = k[:, k.shape[1] - S :], v[:, v.shape[1] - S :]
    if window is not None and window >= S:
        window = None
    if not causal or (T == 1 and window is None):
        return _call(q, k, v, scale)
    if window is None and S == T:
        # torch's own causal mask aligns the first query with the first key: it serves only S == T.
        return _call(q, k, v, scale, causal=True)
    if window is not None and S == T:
        return _band(q, k, v, scale, window)
    return _call(q, k, v, scale, mask=visible(T, S, causal, window, q.device))


def _band(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """The first `window` queries see all keys before them; the others go in blocks of C, over window + C keys each."""
    B, T = q.shape[:2]
    C = min(BAND, T - window)
    first = _call(q[:, :window], k[:, :window], v[:, :window], scale, causal=True)
    # Positions added at the end are seen by no query that is kept.
    q, k, v = (pad(x, (0, 0, 0, 0, 0, (window - T) % C)) for x in (q, k, v))
    q = q[:, window:].unflatten(1, (-1, C)).flatten(0, 1)
    k, v = (x.unfold(1, window + C, C).movedim(-1, 2).flatten(0, 1) for x in (k, v))
    others = _call(q, k, v, scale, mask=visible(C, window + C, True, window, q.device))
    return torch.cat([first, others.unflatten(0, (B, -1)).flatten(1, 2)], dim=1)[:, :T]


def _call(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """torch's fused kernel on our layout, spared the cases that it would refuse and compute the slow way."""
    dtype, K, V = q.dtype, q.shape[3], v.shape[3]
    narrow = dtype in (torch.bfloat16, torch.float16)
    if q.device.type == "cpu":
        if K != V:
            # The fused kernel wants equal widths. Zeros change no score, and add columns of zeros to the output.
            q, k, v = (pad(x, (0, max(K, V) - x.shape[3])) if x.shape[3] < max(K, V) else x for x in (q, k, v))
        if mask is None and wide.serves(q, k):
            o = wide.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale, causal)
            return o.transpose(1, 2)[..., :V]
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if narrow and learning and k.shape[1] < WIDENED_KEYS:
            # Its backward in bf16 has a cost that does not shrink with the sequence: in fp32, 64 keys train twice as fast.
            q, k, v = q.float(), k.float(), v.float()
    elif mask is not None and q.shape[2] != k.shape[2]:
        # On a GPU the fused kernel that takes a mask does not take grouped heads.
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    o = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)[..., :V].to(dtype)
