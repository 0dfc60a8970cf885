"""Along which dim FSDP2 cuts a parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn
from torch.distributed.tensor import Shard


def dim_to_cut(shape: Sequence[int], ranks: int) -> int:
    """The first dim, unless filling it up to a multiple of `ranks` would make the parameter an eighth larger or more.

    FSDP2 sends and holds what it fills up with: 16 experts in one tensor over 1024 ranks would become 1024. Other dims it cuts
    in equal parts only, so the largest that divides by `ranks` is taken; where none does, it is the first dim after all.
    """
    if math.ceil(shape[0] / ranks) * ranks < 1.125 * shape[0]:
        return 0
    even = [dim for dim in range(1, len(shape)) if shape[dim] and shape[dim] % ranks == 0]
    return max(even, key=lambda dim: shape[dim], default=0)


def placement(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """What fully_shard's `shard_placement_fn` answers: None means the first dim."""
    dim = dim_to_cut(parameter.shape, ranks) if parameter.dim() else 0
    return Shard(dim) if dim else None
