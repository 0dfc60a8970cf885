"""Memory bandwidth by five patterns over arrays of growing size, from inside the caches to far beyond them.

    copy  c = a        2N bytes         add    c = a + b        3N bytes         dot  a . b   2N bytes
    mul   b = s c      2N               triad  a = b + s c      3N

with N bytes an array: the counts of STREAM (McCalpin 1995) and BabelStream (Deakin et al. 2016), which leave out what a CPU reads
of a line before it writes it. Arrays are fp64, as BabelStream's, and the patterns are torch's own operators: what a model's
elementwise work can reach without a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.benching.hardware import machine
from kernels.benching.hardware.clock import Clock
from kernels.benching.timing import Timing

ARRAYS = {"copy": 2, "mul": 2, "add": 3, "triad": 3, "dot": 2}  # how many arrays a pattern moves
SCALAR = 0.4
ITEM = 8  # bytes of fp64
BEYOND = 4  # an array of so many times the cache's size is not served from it (STREAM's rule)
# Elements compared at a time: on a CPU so few that temporaries stay in the cache, and that no fresh pages are asked for.
SLICE = {"cpu": 1 << 17, "cuda": 1 << 25}
EXACT = 1e-15  # relative; one rounding of fp64
SUMMED = 1e-9  # relative; a sum of 2^31 fp64 values in any order is closer


@dataclass(frozen=True)
class Stream:
    """One pattern over arrays of one size. wrong: what its answer had wrong, or ""."""

    op: str
    array_bytes: int
    timing: Timing
    wrong: str = ""

    @property
    def gbs(self) -> float:
        """GB/s (1e9 bytes), median."""
        return ARRAYS[self.op] * self.array_bytes / self.timing.median / 1e9


def default_sizes(device: torch.device, *, quick: bool = False) -> list[int]:
    """Bytes of one array, ascending: beyond the caches where an eighth of the free memory allows it. quick: the largest only."""
    wanted = 1 << (max(BEYOND * machine.cache_bytes(device), 256 << 20) - 1).bit_length()
    allowed = 1 << (max(machine.free_bytes(device) // 8, 1 << 20).bit_length() - 1)
    largest = min(wanted, allowed)
    if quick:
        return [largest]
    return [size for size in (1 << power for power in range(16, 48, 2)) if size < largest] + [largest]


def remark(sizes: Sequence[int], cache: int) -> str:
    """What to know about the figures for memory when arrays of these sizes are measured, or ""."""
    if max(sizes) >= BEYOND * cache:
        return ""
    return (
        f"the largest array has {max(sizes) / 2**20:g} MiB, less than {BEYOND} times the cache of {cache / 2**20:g} MiB: "
        "some of it may have come from the cache"
    )


def ceilings(streams: Sequence[Stream], cache: int) -> dict[str, float]:
    """GB/s of each pattern: the best over arrays that the caches do not hold, or the largest array where there is none."""
    found: dict[str, float] = {}
    for op in ARRAYS:
        right = [s for s in streams if s.op == op and not s.wrong]
        past = [s for s in right if s.array_bytes >= BEYOND * cache]
        if not past and right:
            past = [max(right, key=lambda s: s.array_bytes)]
        if past:
            found[op] = max(s.gbs for s in past)
    return found


def measure(sizes: Sequence[int], clock: Clock) -> Iterator[Stream]:
    """Every pattern at every size, smallest arrays first.

    Nothing is flushed: how the rate falls from cache to cache is what the small arrays are there for.
    """
    for size in sizes:
        arrays = Arrays(size // ITEM, clock.device)
        for op in ARRAYS:
            call = arrays.calls()[op]
            timing = clock.time(call, flush=False)
            yield Stream(op, size, timing, arrays.wrong(op, call))
        del arrays


class Arrays:
    """Three arrays a, b, c of `length` random fp64 values, and the patterns over them."""

    def __init__(self, length: int, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)
        # Random, as constant data makes GPUs faster than they are; repeated, as random numbers take longer than the benchmark.
        tile = torch.rand(min(length, 1 << 18), dtype=torch.float64, device=device, generator=generator) + 0.5
        # Filled by all threads first, so that the pages of each lie on the memory next to it.
        self.a, self.b, self.c = (torch.empty(length, dtype=torch.float64, device=device).fill_(0.0) for _ in range(3))
        for shift, array in enumerate((self.a, self.b, self.c)):
            for start in range(0, length, tile.numel()):
                piece = array[start : start + tile.numel()]
                piece.copy_(tile.roll(shift)[: piece.numel()])

    def calls(self) -> dict[str, Callable[[], object]]:
        a, b, c = self.a, self.b, self.c
        return {
            "copy": lambda: c.copy_(a),
            "mul": lambda: torch.mul(c, SCALAR, out=b),
            "add": lambda: torch.add(a, b, out=c),
            "triad": lambda: torch.add(b, c, alpha=SCALAR, out=a),
            "dot": lambda: torch.dot(a, b),
        }

    def wrong(self, op: str, call: Callable[[], object]) -> str:
        """What is wrong with the answer of `call`, or "".

        The target is filled with NaN first, so that an element that was never written shows; every element is then taken back
        to what it came from by other operators.
        """
        a, b, c = self.a, self.b, self.c
        if op == "dot":
            found, wanted = float(torch.dot(a, b)), sum(float((x * y).sum()) for x, y in _slices(a, b))
            off = abs(found - wanted) / abs(wanted)
            return "" if off <= SUMMED else f"the dot product is off by {off:.1e}"
        target = {"copy": c, "mul": b, "add": c, "triad": a}[op]
        target.fill_(float("nan"))
        call()
        bad = 0
        for x, y, z in _slices(a, b, c):
            inputs, expected = {
                "copy": ((x,), z),
                "mul": ((z,), y / SCALAR),
                "add": ((x, y), z),
                "triad": ((y, SCALAR * z), x),
            }[op]
            difference = (expected - sum(inputs[1:], inputs[0])).abs()
            bad += int((~(difference <= (0.0 if op == "copy" else 4 * EXACT) * expected.abs())).sum())
        return f"{bad} of {a.numel()} elements of {op} are wrong" if bad else ""


def _slices(*arrays: Tensor) -> Iterator[tuple[Tensor, ...]]:
    size = SLICE[arrays[0].device.type]
    for start in range(0, arrays[0].numel(), size):
        yield tuple(array[start : start + size] for array in arrays)
