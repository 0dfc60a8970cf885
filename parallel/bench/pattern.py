"""Data whose collective has a known answer, to the last bit.

Every buffer repeats a table of 251 small integers, one table a rank and round. 251 is prime: chunks that land a power of two away
from their place do not look right by accident. The answer of a reduction repeats a table too, so buffers of any size are filled
and checked at the speed of memory. Values are so small that sums and products are exact in every dtype, int8 and bf16 included.
"""

from __future__ import annotations

import torch
from torch import Tensor

PERIOD = 251
LARGEST = 120  # of any value and sum: exact in bf16 (up to 256), and inside int8 (up to 127)
NEVER = 125  # what outputs hold before the collective writes them
CHUNK = 1 << 22  # elements compared at a time, to keep the comparison's own memory small


def table(rank: int, ranks: int, redop: str, turn: int) -> Tensor:
    """Rank's values [251] int64 in a group of `ranks`. turn: which round of checks, so that stale answers show."""
    generator = torch.Generator().manual_seed(turn * 1_000_003 + rank)

    def random(values: int) -> Tensor:
        return torch.randint(0, values, (PERIOD,), generator=generator)

    if redop in ("sum", "avg"):
        if ranks <= LARGEST:
            return random(LARGEST // ranks + 1)
        return _some(random(2), _active(rank, ranks, LARGEST))
    if redop == "prod":  # of ones and twos, at most 2**6
        return 1 + _some(random(2), _active(rank, ranks, 6))
    return random(LARGEST + 1)


def _active(rank: int, ranks: int, most: int) -> Tensor:
    """Marks [251] where this rank counts: at every place at most `most` ranks do, and each rank does at some."""
    every = -(-ranks // most)
    return ((torch.arange(PERIOD) + rank) % every == 0).long()


def _some(chosen: Tensor, active: Tensor) -> Tensor:
    """The chosen of the active places; all of these where none is: a rank that counts nowhere could fail unseen."""
    both = chosen * active
    return both if both.any() else active


def answer(ranks: int, redop: str, turn: int) -> Tensor:
    """The reduction of all ranks' tables, [251]: int64, or fp64 for avg."""
    tables = torch.stack([table(rank, ranks, redop, turn) for rank in range(ranks)])
    if redop == "avg":
        return tables.double().mean(0)
    if redop == "prod":
        return tables.prod(0)
    return {"sum": tables.sum(0), "min": tables.amin(0), "max": tables.amax(0)}[redop]


def fill(x: Tensor, values: Tensor, offset: int = 0) -> None:
    """x [N] becomes elements offset, offset + 1, ... of the repeated table."""
    values = values.roll(-(offset % PERIOD)).to(x)
    whole = x.numel() // PERIOD * PERIOD
    x[:whole].view(-1, PERIOD).copy_(values.expand(whole // PERIOD, PERIOD))
    x[whole:].copy_(values[: x.numel() - whole])


def wrong(x: Tensor, values: Tensor, offset: int = 0, tolerance: float = 0.0) -> int:
    """How many elements of x [N] are not those of the repeated table. tolerance: relative; NaN is wrong always."""
    values = values.roll(-(offset % PERIOD)).to(x)
    count = 0
    step = CHUNK // PERIOD * PERIOD
    for part in x.split(step):
        whole = part.numel() // PERIOD * PERIOD
        for piece, expected in (
            (part[:whole].view(-1, PERIOD), values),
            (part[whole:], values[: part.numel() - whole]),
        ):
            if tolerance:
                right = (piece - expected).abs() <= tolerance * expected.abs()
                count += right.numel() - int(right.sum())
            else:
                count += int((piece != expected).sum())
    return count
