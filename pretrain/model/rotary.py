"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the rotate-half layout that Llama-style checkpoints use."""

from __future__ import annotations

from torch import Tensor

from kernels import rotary


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first 2 * cos.shape[-1] channels of x [B, T, H, K]; the others pass unchanged (partial RoPE).

    cos, sin: fp32 [B, T, 1, R / 2]. The rotation is computed in fp32 at least and returned in x's dtype.
    """
    return rotary(x, cos, sin)


def rotary_channels(head_dim: int, fraction: float) -> int:
    """How many of a head's channels are rotated: the largest even number within the fraction.

    Raises ValueError when a fraction above 0 leaves no pair of channels to rotate.
    """
    channels = int(head_dim * fraction) // 2 * 2
    if fraction > 0 and channels == 0:
        raise ValueError(
            f"rope_fraction={fraction} of head_dim={head_dim} channels leaves no pair to rotate; "
            f"choose at least {2 / head_dim:.3g}, or 0 for no positions"
        )
    return channels
