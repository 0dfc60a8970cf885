"""How long one device takes: for a matrix product, for other arithmetic, for bytes through its memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from pretrain.estimate.hardware import Hardware
from pretrain.estimate.measured import Measured

# Share of the datasheet's matrix rate that well-tuned large products reach, by the device's name, for files without measurements.
# MI300X 668 of 1307, H100 and H200 about 720 of 989 TFLOP/s (public sweeps of matrix products).
REACHED = {"MI300X": 0.51, "H100": 0.73, "H200": 0.73}
REACHED_ELSEWHERE = 0.6
# Share of the datasheet's memory bandwidth that streams reach: published 4.33 of 5.3 TB/s on MI300X, 3.04 of 3.35 on H100.
STREAMED = {"MI300X": 0.817, "H100": 0.906, "H200": 0.9}
STREAMED_ELSEWHERE = 0.8
# A product reaches 90 % of the ceiling at 200 GFLOP on a device of 668 TFLOP/s (Anthony et al. 2025, arXiv 2511.17127): as if
# each took this much longer than its FLOPs say, to fill the device and to empty it again.
RAMP = 200e9 / 668e12 / 9.0
# Attention reaches less than plain products: softmax and masks share the time. Half of it is usual for fused kernels on GPUs; on
# CPUs a fifth was measured (torch's forms; recurrences in chunks reach less still).
KERNEL_SHARE, KERNEL_SHARE_CPU = 0.5, 0.2


@dataclass(frozen=True, eq=False)  # known by identity, so that times can be remembered
class Chip:
    """One device at one precision ("bf16" or "fp32"), in SI units.

    nominal: FLOP/s by the datasheet. ceiling: of the best matrix product. bandwidth: bytes/s of streams through memory.
    measured: rates by size, where there are some. ramp: seconds that a product takes more than at the ceiling's rate, where there
    are none. kernels: share of the ceiling that attention and recurrences reach. notes: where the numbers come from.
    """

    name: str
    precision: str
    nominal: float
    ceiling: float
    bandwidth: float
    memory: float
    ramp: float
    kernels: float = KERNEL_SHARE
    measured: Measured | None = field(default=None, repr=False)
    notes: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, hardware: Hardware, precision: str, efficiency: float | None = None) -> Chip:
        """efficiency: share of the nominal matrix rate to count with, instead of what was measured or is assumed."""
        nominal = hardware.peak(precision)
        measured, notes = hardware.measured, []
        found = None if measured is None else measured.peak(precision)
        table = None
        if efficiency is not None:
            ceiling = efficiency * nominal
            notes.append(f"matrix products: {efficiency:.0%} of the nominal {nominal / 1e12:.4g} TFLOP/s, as told")
        elif measured is not None and found is not None:
            sizes = {row[:3] for row in measured.matmul if row[3] == precision}
            ceiling, table = found, measured if sizes else None
            notes.append(
                f"matrix products: measured, at most {found / 1e12:.4g} TFLOP/s; by size from {len(sizes)} sizes"
            )
        else:
            share = _known(hardware, REACHED, REACHED_ELSEWHERE)
            ceiling = share * nominal
            notes.append(
                f"matrix products: not measured; {share:.0%} of the nominal {nominal / 1e12:.4g} TFLOP/s is assumed "
                "(python -m kernels.bench hardware --write measures)"
            )
        if table is None:
            notes.append(
                f"small matrix products: each takes {1e6 * RAMP:.0f} us more than its FLOPs at that rate, so that 90 % of it is "
                "reached at 200 GFLOP on a device of 668 TFLOP/s"
            )
        streamed = None if measured is None else measured.bandwidth()
        if streamed is not None:
            bandwidth = streamed
            notes.append(f"memory: measured {bandwidth / 1e9:.4g} GB/s")
        else:
            share = _known(hardware, STREAMED, STREAMED_ELSEWHERE)
            bandwidth = share * 1e9 * hardware.memory_bandwidth_gbs
            notes.append(
                f"memory: not measured; {share:.0%} of the nominal {hardware.memory_bandwidth_gbs:g} GB/s is assumed"
            )
        cpu = measured is not None and measured.threads is not None
        kernels = KERNEL_SHARE_CPU if cpu else KERNEL_SHARE
        notes.append(f"arithmetic outside of matrix products (attention, recurrences): {kernels:.0%} of that rate")
        return cls(
            hardware.name,
            precision,
            nominal,
            ceiling,
            bandwidth,
            hardware.memory_gib * 2**30,
            0.0 if table is not None else RAMP,
            kernels,
            table,
            tuple(notes),
        )

    def product(self, m: float, n: float, k: float, width: int) -> float:
        """Seconds of [m, k] x [k, n] with entries of `width` bytes."""
        return _product(self, float(m), float(n), float(k), width) if min(m, n, k) > 0.0 else 0.0

    def arithmetic(self, flops: float) -> float:
        """Seconds of FLOPs that are no plain matrix products."""
        return flops / (self.kernels * self.ceiling)

    def stream(self, count: float) -> float:
        """Seconds of bytes through memory."""
        return count / self.bandwidth

    def rate(self, m: float, n: float, k: float) -> float:
        """FLOP/s of a product of this size: by the measured sizes nearest to it, or the ceiling where none was measured."""
        if self.measured is None:
            return self.ceiling
        rows, columns, depth = (max(1, round(size)) for size in (m, n, k))
        return min(self.ceiling, self.measured.rate(rows, columns, depth, self.precision) or self.ceiling)


@lru_cache(maxsize=100_000)
def _product(chip: Chip, m: float, n: float, k: float, width: int) -> float:
    flops = 2.0 * m * n * k
    moved = chip.stream(width * (m * k + k * n + m * n))
    return max(flops / chip.rate(m, n, k), moved) + chip.ramp


def _known(hardware: Hardware, shares: dict[str, float], elsewhere: float) -> float:
    names = [*hardware.match, hardware.name]
    return next((share for part, share in shares.items() if any(part in name for name in names)), elsewhere)
