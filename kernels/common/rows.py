"""Walking over the rows of a tensor in blocks that stay in a core's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 19  # a thread: the three blocks in use at a time fit a second-level cache of 2 MiB


def row_blocks(x: Tensor, elements: int | None = None) -> Iterator[slice]:
    """Slices of the first dim of x: blocks of BLOCK_BYTES a thread on a CPU, all rows at once elsewhere.

    elements: entries of x to a block and thread instead, for temporaries that are wider than x or more in number.
    A temporary of a whole tensor is fresh memory, and on a CPU mapping its pages costs more than the arithmetic.
    """
    n = x.shape[0]
    rows = n
    if x.device.type == "cpu" and n:
        limit = BLOCK_BYTES // x.element_size() if elements is None else elements
        rows = max(1, limit * torch.get_num_threads() // max(1, x.numel() // n))
    for start in range(0, n, max(rows, 1)):
        yield slice(start, min(start + rows, n))
