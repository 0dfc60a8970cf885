"""What a Triton kernel must know about the device under it: name, limits, and which precision its fp32 dots should
ask for.

Names are those of the compilers: `sm80` (A100), `sm90` (H100, H200), `sm100` (B200), `gfx942` (MI300), `gfx950`
(MI350), and `generic` for everything else: other devices, the CPU and Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.dispatch import interpreting


@dataclass(frozen=True)
class Architecture:
    """Limits of one architecture. A unit is a CU (AMD) or an SM (NVIDIA); a SIMD is a quarter of it.

    Sources: CUDA C Programming Guide, table of technical specifications per compute capability; AMD CDNA3 and CDNA4
    instruction set guides; occupancy steps of LLVM's AMDGPU backend (`register_granule` is the one LLVM counts with).
    """

    name: str
    vendor: str  # "nvidia", "amd" or "none"
    warp_size: int  # lanes
    units: int  # CUs or SMs of the full product; 0 when unknown
    dies: int  # L2 domains among which blocks are dealt in turn (AMD XCDs); 1 when there is one
    shared_memory_block: int  # bytes that one block may use
    shared_memory_unit: int  # bytes of one unit, shared by its resident blocks
    shared_memory_reserved: int  # bytes the system takes from every block
    registers_lane: int  # 32-bit registers (AMD: vector + accumulation) that one lane may use
    registers_simd: int  # AMD: per lane and SIMD; NVIDIA: 32-bit registers of one SM quarter
    register_granule: int  # AMD: registers per lane; NVIDIA: registers per warp
    warps_simd: int  # resident warps per SIMD
    blocks_unit: int  # resident blocks per unit
    simds: int = 4
    capability: int = 0  # NVIDIA compute capability times ten

    def blocks_resident(self, registers: int, shared_memory: int, warps: int) -> int:
        """Blocks of `warps` warps that one unit holds at once, by registers per lane, shared memory (bytes) and slots.

        0 means that the block cannot be launched. Needs a real architecture, not `generic`.
        """
        assert self.vendor != "none", "the occupancy of an unknown architecture cannot be computed"
        registers = max(registers, 1)
        if (
            registers > self.registers_lane
            or shared_memory > self.shared_memory_block
            or warps > self.simds * self.warps_simd
        ):
            return 0
        if self.vendor == "amd":
            granted = -(-registers // self.register_granule) * self.register_granule
        else:
            granted = -(-registers * self.warp_size // self.register_granule) * self.register_granule
        per_simd = min(self.registers_simd // granted, self.warps_simd)
        # Warps of one block are dealt over the SIMDs; a block of fewer warps than SIMDs leaves the rest to other
        # blocks.
        blocks = self.simds * per_simd // warps
        blocks = min(blocks, self.blocks_unit)
        footprint = shared_memory + self.shared_memory_reserved if shared_memory or self.shared_memory_reserved else 0
        return min(blocks, self.shared_memory_unit // footprint) if footprint else blocks

    def warps_per_simd(self, registers: int, shared_memory: int, warps: int) -> float:
        """Occupancy in resident warps per SIMD, counting registers, shared memory and slots."""
        return self.blocks_resident(registers, shared_memory, warps) * warps / self.simds


def _nvidia(name: str, capability: int, units: int, shared_block: int, shared_unit: int) -> Architecture:
    return Architecture(
        name=name,
        vendor="nvidia",
        warp_size=32,
        units=units,
        dies=1,
        shared_memory_block=shared_block,
        shared_memory_unit=shared_unit,
        shared_memory_reserved=1024,
        registers_lane=255,
        registers_simd=16384,
        register_granule=256,
        warps_simd=16,
        blocks_unit=32,
        capability=capability,
    )


def _amd(name: str, units: int, shared: int) -> Architecture:
    return Architecture(
        name=name,
        vendor="amd",
        warp_size=64,
        units=units,
        dies=8,
        shared_memory_block=shared,
        shared_memory_unit=shared,
        shared_memory_reserved=0,
        registers_lane=512,
        registers_simd=512,
        register_granule=8,
        warps_simd=8,
        blocks_unit=16,
    )


ARCHITECTURES: dict[str, Architecture] = {
    "sm80": _nvidia("sm80", 80, 108, 166912, 167936),
    "sm90": _nvidia("sm90", 90, 132, 232448, 233472),
    "sm100": _nvidia("sm100", 100, 148, 232448, 233472),
    "gfx942": _amd("gfx942", 304, 65536),
    "gfx950": _amd("gfx950", 256, 163840),
    # The limits of `generic` are the smallest of those above, so that a kernel which sizes itself by them runs
    # anywhere.
    "generic": Architecture("generic", "none", 32, 0, 1, 65536, 65536, 0, 255, 16384, 256, 8, 16),
}

_assumed: str | None = None


def architecture(device: torch.device) -> str:
    """The name of `device`'s architecture, or the one that `assume` says."""
    if _assumed is not None:
        return _assumed
    if device.type != "cuda" or interpreting():
        return "generic"
    return _of_device(device.index if device.index is not None else torch.cuda.current_device())


def facts(name: str) -> Architecture:
    """The record of an architecture.

    Raises ValueError for an unknown name.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"{name!r} is not a known architecture; choose one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


@functools.cache
def _of_device(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]  # "gfx942:sramecc+:xnack-"
    else:
        # The consumer and inference chips of a generation (8.6, 8.9, 12.x) have far less shared memory: they are
        # generic.
        name = {(8, 0): "sm80", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}.get(
            (properties.major, properties.minor), "generic"
        )
    return name if name in ARCHITECTURES else "generic"


@contextlib.contextmanager
def assume(name: str) -> Iterator[Architecture]:
    """Within this context every device counts as `name`: for compiling without the device."""
    global _assumed
    record = facts(name)
    before, _assumed = _assumed, name
    try:
        yield record
    finally:
        _assumed = before


def vendor(name: str) -> str:
    """ "nvidia", "amd" or "none". A `generic` device on a machine with a GPU has that GPU's vendor."""
    known = facts(name).vendor
    if known == "none" and _assumed is None and not interpreting() and torch.cuda.is_available():
        return "amd" if torch.version.hip else "nvidia"
    return known


# Measured costs behind this table (one 64x64x64 fp32 dot, 4 warps): on NVIDIA "ieee" uses no tensor core and spills
# kilobytes; "tf32" takes 63 registers and keeps 10 bits of mantissa; "tf32x3" takes 122 to 196 registers and keeps
# fp32's accuracy to about 1e-6. CDNA has true fp32 matrix instructions, so "ieee" is both exact and cheap there (69
# registers). The names used here are accepted by triton 3.6 and newer; gfx950 rejects "tf32", no AMD target knows
# "tf32x3".
_NVIDIA_PRECISION = {"state": "tf32x3", "inverse": "tf32x3", "fast": "tf32"}


def dot_precision(name: str, purpose: str) -> str:
    """The `input_precision` of a `tl.dot` whose operands are fp32, a constexpr of the kernel.

    name: as returned by `architecture`. purpose: "state" (products that feed a state carried over the whole sequence),
    "inverse" (products inside a triangular inverse, where errors multiply) or "fast" (everything else: error of one
    chunk, no worse than that of the tensor's own tf32 rounding). Dots of bf16 or fp16 operands ignore
    `input_precision`.
    """
    if purpose not in _NVIDIA_PRECISION:
        raise ValueError(f"{purpose!r} is not a purpose; choose one of {', '.join(_NVIDIA_PRECISION)}")
    return _NVIDIA_PRECISION[purpose] if vendor(name) == "nvidia" else "ieee"


def processor() -> str:
    """The name of the host's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"
