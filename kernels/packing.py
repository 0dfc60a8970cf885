"""Packed batches: several sequences in one row of tokens, bounded by `cu_seqlens` (int32 [N+1], from 0 to T)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, length: int, device: torch.device) -> int:
    """Number of sequences N in a packed batch.

    cu_seqlens: int32 or int64 [N+1], cumulative lengths in tokens; empty sequences are allowed.
    The values are read on the CPU only, where it costs nothing: on an accelerator every call would wait for the device.

    Raises ValueError when the tensor cannot describe `length` tokens in one row.
    """
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"cu_seqlens must be an int32 tensor [N+1] with N >= 1, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if batch != 1:
        raise ValueError(
            f"cu_seqlens needs a batch of 1 (all sequences laid end to end in one row), got a batch of {batch}"
        )
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, the tokens are on {device}: move it there")
    if device.type == "cpu":
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens {length}, got {bounds}")
    return cu_seqlens.numel() - 1


def sequence_bounds(cu_seqlens: Tensor | None, batch: int, length: int) -> list[tuple[int, int, int]]:
    """(row, first token, end) of each sequence: one a row of a dense batch, or the packed ones of row 0."""
    if cu_seqlens is None:
        return [(row, 0, length) for row in range(batch)]
    bounds = cu_seqlens.tolist()
    return [(0, start, end) for start, end in itertools.pairwise(bounds)]


def sequence_of_token(cu_seqlens: Tensor | None, T: int) -> Tensor | None:
    """int32 [T]: the sequence of each packed token. Empty ones have no token, hence right=True on the ends."""
    if cu_seqlens is None:
        return None
    tokens = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True, out_int32=True)
