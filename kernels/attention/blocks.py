"""Causal attention over a long row on a CPU, by blocks of queries whose scores stay in the core's own cache.

    p_ij = 2^(x_i . k_j - l_i),  x = scale log2(e) q,  l_i = log2 sum_j 2^(x_i . k_j),  o_i = sum_j p_ij v_j
    dv_j = sum_i p_ij do_i,  d_ij = p_ij (do_i . v_j - do_i . o_i),  dq_i = scale sum_j d_ij k_j,  dk_j = scale sum_i d_ij q_i

Powers of two, since the vendor's vector library behind torch.exp takes four times as long as torch.exp2 on the processors that
this serves (wide.py). The queries of all heads that share keys are rows of one product. Scores are sums in fp32; for bf16 inputs
the probabilities and their gradients are rounded to bf16 for the products of the backward, as fused kernels do everywhere.

Source: the backward of Dao 2023 (2307.08691); sums over parts of the keys as in Milakov and Gimelshein 2018 (1805.02867).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from kernels.common.exponential import LOG2E

QUERIES = 256  # of one head in a block
ROWS = 512  # queries of all heads that share keys, in a block
KEYS = 1024  # in a part: its scores are 2 MiB


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(o [B, H, T, V] in q's dtype, l fp32 [B, H, T]) of q [B, H, T, K], k [B, HKV, T, K] and v [B, HKV, T, V].

    l is a logsumexp to base 2.
    """
    B, H, T, K = q.shape
    HKV, V = k.shape[1], v.shape[3]
    G = H // HKV
    o = q.new_empty(B, T, H, V).transpose(1, 2)
    logsumexp = q.new_empty(B, H, T, dtype=torch.float32)
    memory = q.new_empty(_scores(T, G), dtype=torch.float32)
    unseen = torch.full((QUERIES, QUERIES), -math.inf).triu_(1)
    for b, h in product(range(B), range(HKV)):
        key, value, heads = k[b, h].float(), v[b, h].float(), slice(h * G, h * G + G)
        for first, last, parts in _blocks(T, G):
            C = last - first
            x = q[b, heads, first:last].float().mul(scale * LOG2E).reshape(G * C, K)
            top, total = x.new_full((G * C, 1), -math.inf), x.new_zeros(G * C, 1)
            summed = x.new_zeros(G * C, V)
            for start, end in parts:
                scores = torch.mm(x, key[start:end].T, out=_view(memory, G * C, end - start))
                if end == last:
                    scores.view(G, C, -1)[:, :, first - start :].add_(unseen[:C, :C])
                highest = torch.maximum(top, scores.amax(1, keepdim=True))
                p = scores.sub_(highest).exp2_()
                shrunk = top.sub_(highest).exp2_()  # 0 before the first part
                total.mul_(shrunk).add_(p.sum(1, keepdim=True))
                summed.mul_(shrunk).addmm_(p, value[start:end])
                top = highest
            o[b, heads, first:last] = summed.div_(total).view(G, C, V)
            logsumexp[b, heads, first:last] = top.add_(total.log2_()).view(G, C)
    return o, logsumexp


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the dtypes of q, k, v; o and logsumexp are what `forward` returned."""
    B, H, T, K = q.shape
    HKV, V = k.shape[1], v.shape[3]
    G = H // HKV
    narrow = q.dtype == torch.bfloat16
    dq = q.new_empty(B, T, H, K).transpose(1, 2)
    dk, dv = (x.new_empty(B, T, HKV, x.shape[3]).transpose(1, 2) for x in (k, v))
    of_p, of_d = (q.new_empty(_scores(T, G), dtype=torch.float32) for _ in range(2))
    rounded = q.new_empty(_scores(T, G) if narrow else 0, dtype=torch.bfloat16)
    for b, h in product(range(B), range(HKV)):
        key, value, heads = k[b, h].float(), v[b, h].float(), slice(h * G, h * G + G)
        own_key = k[b, h].contiguous() if narrow else key
        dkey, dvalue = key.new_zeros(T, K), key.new_zeros(T, V)
        for first, last, parts in _blocks(T, G):
            C = last - first
            queries, dout = (x[b, heads, first:last].reshape(G * C, -1) for x in (q, do))
            if not narrow:
                queries, dout = queries.float(), dout.float()
            x, wide = queries.float().mul(scale * LOG2E), dout.float()
            delta = (wide * o[b, heads, first:last].reshape(G * C, V)).sum(1, keepdim=True)
            norm = logsumexp[b, heads, first:last].reshape(-1, 1)
            dqueries = x.new_zeros(G * C, K)
            for start, end in parts:
                n = end - start
                p = torch.mm(x, key[start:end].T, out=_view(of_p, G * C, n)).sub_(norm).exp2_()
                if end == last:
                    p.view(G, C, n)[:, :, first - start :].tril_()
                d = torch.mm(wide, value[start:end].T, out=_view(of_d, G * C, n)).sub_(delta).mul_(p)
                if narrow:
                    p = _view(rounded, G * C, n).copy_(p)
                    dvalue[start:end].add_(torch.mm(p.T, dout))
                    d = p.copy_(d)
                    dqueries.add_(torch.mm(d, own_key[start:end]))
                    dkey[start:end].add_(torch.mm(d.T, queries))
                else:
                    dvalue[start:end].addmm_(p.T, dout)
                    dqueries.addmm_(d, key[start:end])
                    dkey[start:end].addmm_(d.T, queries)
            dq[b, heads, first:last] = dqueries.mul_(scale).view(G, C, K)
        dk[b, h], dv[b, h] = dkey.mul_(scale), dvalue
    return dq, dk, dv


def _block(group: int) -> int:
    """Queries of a head in a block: a power of two, so that parts end where blocks do."""
    size = QUERIES
    while size > 64 and size * group > ROWS:
        size //= 2
    return size


def _blocks(length: int, group: int) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """(first, last) query of each block, exclusive, and the parts of keys that it sees; the last part ends with the block.

    oneDNN compiles a kernel for each shape. A block that is not full has a part of its own for the keys beside it, so that the
    others have no more lengths than those of full blocks.
    """
    size = _block(group)
    for first in range(0, length, size):
        last = min(first + size, length)
        end = last if last - first == size else first
        parts = [(start, min(start + KEYS, end)) for start in range(0, end, KEYS)]
        yield first, last, parts if end == last else [*parts, (first, last)]


def _scores(length: int, group: int) -> int:
    """The most scores that a block has in a part."""
    return group * min(_block(group), length) * min(KEYS, length)


def _view(memory: Tensor, rows: int, columns: int) -> Tensor:
    return memory[: rows * columns].view(rows, columns)
