"""The choices sorted by expert, on the device: two kernels, no atomics, nothing read back by the host.

Every program counts the experts among its share of the choices; then every program adds up the counts of those before it
and places its own choices. So the order is that of a stable sort.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.architecture import architecture, facts
from kernels.tuning import parameters

# BLOCK: choices compared with each other at a time. LOOK: programs whose counts are added up at a time.
DEFAULTS: dict[str, dict[str, dict[str, int]]] = {
    "experts_sort": {"generic": {"BLOCK": 128, "LOOK": 16, "num_warps": 4, "num_stages": 1}},
}
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "experts_sort": [{"BLOCK": b, "num_warps": w} for b in (64, 128, 256) for w in (2, 4, 8)],
}
UNITS_UNKNOWN = 4  # where the number of CUs or SMs is not known


@dataclass(frozen=True)
class Sorted:
    """order: int32 [P], the choice (token * k + j) that each row holds, rows sorted by expert.

    table: int32 [2, BINS]; row 0: the row at which each expert begins, row 1: the tile of `tile` rows at which it begins;
    entry E holds the number of all rows, and of all tiles. tiles: never fewer than there are.
    """

    order: Tensor
    table: Tensor
    tile: int
    tiles: int
    experts: int
    bins: int


@triton.jit(do_not_specialize=["P", "span"])
def count_kernel(indices, counts, P, span, E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """counts [programs, BINS]: how often each expert is chosen in each program's `span` choices; what is past P counts as E."""
    program = tl.program_id(0)
    begin = program * span
    end = tl.minimum(begin + span, P)
    total = tl.zeros([BINS], dtype=tl.int32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        expert = tl.load(indices + at, mask=at < end, other=E).to(tl.int32)
        total += tl.histogram(expert, BINS)
    tl.store(counts + program * BINS + tl.arange(0, BINS), total)


@triton.jit(do_not_specialize=["P", "span", "programs"])
def place_kernel(
    indices, counts, order, table, P, span, programs,
    E: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """order and table of Sorted, from counts [programs, BINS]."""
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    before = tl.zeros([BINS], dtype=tl.int32)
    total = tl.zeros([BINS], dtype=tl.int32)
    for first in range(0, programs, LOOK):
        q = first + tl.arange(0, LOOK)
        some = tl.load(counts + q[:, None] * BINS + bins[None, :], mask=(q < programs)[:, None], other=0)
        total += tl.sum(some, axis=0)
        before += tl.sum(tl.where((q < program)[:, None], some, 0), axis=0)
    starts = tl.cumsum(total, axis=0) - total
    if program == 0:
        tiles = tl.where(bins < E, (total + TILE - 1) // TILE, 0)
        tl.store(table + bins, starts)
        tl.store(table + BINS + bins, tl.cumsum(tiles, axis=0) - tiles)
    base = starts + before
    begin = program * span
    end = tl.minimum(begin + span, P)
    lane = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        at = start + lane
        expert = tl.load(indices + at, mask=at < end, other=E).to(tl.int32)
        earlier = (expert[None, :] == expert[:, None]) & (lane[None, :] < lane[:, None])
        row = tl.gather(base, expert, axis=0) + tl.sum(earlier.to(tl.int32), axis=1)
        tl.store(order + row, at, mask=at < end)
        base += tl.histogram(expert, BINS)


def sort(indices: Tensor, experts: int, tile: int) -> Sorted:
    """indices: int64 [N, k], 0 <= indices < experts. tile: rows of a tile of the products to come."""
    P = indices.numel()
    assert P < 2**31 and indices.is_contiguous()
    arch = architecture(indices.device)
    use = parameters("experts_sort", arch, defaults=DEFAULTS, E=experts)
    look = use.pop("LOOK")
    bins = triton.next_power_of_2(experts + 1)
    # Each program reads the counts of all: as many as the device runs at a time.
    programs = max(1, min(triton.cdiv(P, use["BLOCK"]), facts(arch).units or UNITS_UNKNOWN))
    span = triton.cdiv(triton.cdiv(P, programs), use["BLOCK"]) * use["BLOCK"]
    counts = torch.empty(programs, bins, dtype=torch.int32, device=indices.device)
    order = torch.empty(P, dtype=torch.int32, device=indices.device)
    table = torch.empty(2, bins, dtype=torch.int32, device=indices.device)
    count_kernel[(programs,)](indices, counts, P, span, experts, bins, **use)
    place_kernel[(programs,)](indices, counts, order, table, P, span, programs, experts, bins, tile, LOOK=look, **use)
    return Sorted(order, table, tile, P // tile + min(experts, P), experts, bins)
