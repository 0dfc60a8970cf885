"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the rotate-half layout that Llama-style checkpoints use."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first 2 * cos.shape[-1] channels of x [B, T, H, K]; the others pass unchanged (partial RoPE).

    cos, sin: fp32 [B, T, 1, R / 2]. The rotation is computed in fp32 and returned in x's dtype.
    """
    half = cos.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated
