"""Which figures of a compiled kernel are faults."""

from __future__ import annotations

from kernels.architecture import Architecture
from kernels.offline.figures import Figures

# (kind, sentence). Kinds: spill scratch matrix shared occupancy compile unreadable request row.
Problem = tuple[str, str]


def problems(figures: Figures, arch: Architecture) -> list[Problem]:
    """The faults of one kernel; an empty list means that it may be shipped."""
    found: list[Problem] = []
    if figures.spills:
        found.append(("spill", f"{figures.spills} vector register spills"))
    if figures.scratch:
        found.append(("scratch", f"{figures.scratch} bytes of private memory per lane"))
    dots = figures.dots
    if dots.capable and not figures.matrix:
        found.append(("matrix", f"{dots.capable} dots that matrix units can do, and no matrix instruction"))
    elif dots.lost:
        found.append(("matrix", f"{dots.lost} dots that matrix units can do were lowered to scalar multiply-adds"))
    if figures.shared > arch.shared_memory_block:
        found.append(("shared", f"{figures.shared} bytes of shared memory, {arch.name} has {arch.shared_memory_block}"))
    elif figures.occupancy < 1:
        # Less than a warp a SIMD leaves matrix units without work whatever the schedule; on NVIDIA it is the same as
        # fewer than four warps on an SM.
        found.append(("occupancy", f"{figures.occupancy:g} warps per SIMD: some SIMDs can never have work"))
    return found
