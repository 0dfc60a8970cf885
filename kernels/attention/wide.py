"""Attention on CPUs whose fp32 products go through oneDNN (kernels/common/products.py): which form for which length.

oneDNN compiles a kernel for each shape of a product, which takes half a millisecond and half a megabyte, and starts each in
several microseconds. Short sequences have small products, and documents bring new lengths at every step: torch's fused form
serves them through the BLAS. Long ones are filled up to a multiple of 64, so that their shapes are few. On one thread those that
are causal are ours (blocks.py); torch's form shares heads among threads, and the others. That form is given fp32: without
matrix tiles its bf16 gains nothing here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from kernels.attention import blocks
from kernels.common import products

LONG = 768  # positions from which torch takes blocks of 256 queries: oneDNN is faster by half there, and not before
MULTIPLE = 64
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def serves(q: Tensor, k: Tensor) -> bool:
    """True on such a CPU, in a dtype that fp32 can hold, where there is something to attend to."""
    wanted = q.device.type == "cpu" and q.dtype != torch.float64 and products.in_use() == "onednn"
    return wanted and q.numel() > 0 and k.numel() > 0 and not torch.compiler.is_compiling()


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """o [B, H, T, K] of q [B, H, T, K] and k, v [B, HKV, S, K]; causal only with T = S."""
    o: Tensor = _Attention.apply(q, k, v, scale, causal)
    return o


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        length = q.shape[2]
        long = min(length, k.shape[2]) >= LONG or (causal and length % blocks.QUERIES == 0)
        filling = -length % MULTIPLE if long and causal else 0  # without a causal mask, filled keys would be seen
        ctx.library = "onednn" if long and (causal or not length % MULTIPLE) else "blas"
        ctx.scale, ctx.causal, ctx.filling = scale, causal, filling
        ctx.ours = long and causal and torch.get_num_threads() == 1
        wide = [_filled(x, filling) for x in (q, k, v)]
        with products.using(ctx.library):
            if ctx.ours:
                o, logsumexp = blocks.forward(wide[0], wide[1], wide[2], scale)
            else:
                o, logsumexp = FUSED(*(x.float() for x in wide), 0.0, causal, scale=scale)
        o = o[:, :, :length].to(q.dtype)
        ctx.save_for_backward(q, k, v, o, logsumexp)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, logsumexp = ctx.saved_tensors
        do, filled_q, filled_k, filled_v, o = (_filled(x, ctx.filling) for x in (do, q, k, v, o))
        with products.using(ctx.library):
            if ctx.ours:
                gradients = blocks.backward(do, filled_q, filled_k, filled_v, o, logsumexp, ctx.scale)
            else:
                wide = (x.float() for x in (do, filled_q, filled_k, filled_v, o))
                gradients = FUSED_BACKWARD(*wide, logsumexp, 0.0, ctx.causal, scale=ctx.scale)
        return *(g[:, :, : x.shape[2]].to(x.dtype) for g, x in zip(gradients, (q, k, v))), None, None


def _filled(x: Tensor, filling: int) -> Tensor:
    """x [B, H, T, K] with `filling` positions of zeros after it."""
    return pad(x, (0, 0, 0, filling)) if filling else x
