"""What a sequence leaves behind: its last columns."""

from __future__ import annotations

import torch
from torch import Tensor


def last_columns(x: Tensor, before: Tensor | None, reach: int, cu_seqlens: Tensor | None) -> Tensor:
    """The last `reach` columns of each sequence of x [B, T, C], oldest first: [N, reach, C], no view of x.

    before [N, reach, C]: what stands before each sequence, for those with fewer tokens; None for zeros.
    cu_seqlens [N+1]: packed sequences in one row.
    """
    B, T, C = x.shape
    if cu_seqlens is None and (reach == 0 or reach <= T):
        return x[:, T - reach :].clone()
    if cu_seqlens is None:
        past = x.new_zeros(B, reach, C) if before is None else before.to(x.dtype)
        return torch.cat((past[:, T:], x), dim=1)
    bounds = cu_seqlens.long()
    column = bounds[1:, None] - reach + torch.arange(reach, device=x.device)
    inside = column >= bounds[:-1, None]
    if T == 0:
        return x.new_zeros(len(bounds) - 1, reach, C) if before is None else before.to(x.dtype).clone()
    columns = x[0, torch.where(inside, column, 0)]
    if before is None:
        return columns * inside[..., None]
    slot = torch.where(inside, 0, column - bounds[:-1, None] + reach)
    past = before.to(x.dtype).gather(1, slot[..., None].expand(-1, -1, C))
    return torch.where(inside[..., None], columns, past)
