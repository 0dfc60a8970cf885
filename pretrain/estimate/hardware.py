"""A chip, by its file in configs/hardware/: how fast it is, and which environment suits its drivers and collectives.

How fast it is nominally and, once `python -m kernels.bench hardware --write` has run there, as measured. torch is imported only
by what needs it: scripts read these files before a job starts.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import Field, field_validator

from parallel.config import Strict
from parallel.fabric.topology import Fabric
from pretrain.estimate.measured import Measured
from pretrain.exit import USAGE, Exit

if TYPE_CHECKING:
    import torch

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "hardware"


class Hardware(Strict):
    """One accelerator, from its datasheet."""

    name: str
    match: list[str] = Field(default_factory=list)
    """Parts of the device's name by which torch reports it."""
    bf16_tflops: float = Field(gt=0)
    """Dense bf16 matrix rate, TFLOP/s."""
    fp32_tflops: float = Field(gt=0)
    memory_gib: float = Field(gt=0)
    memory_bandwidth_gbs: float = Field(gt=0)
    """GB/s (1e9 bytes)."""
    fabric: Fabric | None = None
    """What joins these chips in a node and between nodes, as it is usually built; a cluster of another kind: change it here."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables for NCCL or RCCL and the driver, set by launch/slurm.sh, or by hand: see launch/environment_of.py."""
    measured: Measured | None = None
    """What such a chip reached; written by `python -m kernels.bench hardware --write`."""

    @field_validator("environment", mode="before")
    @classmethod
    def _names_and_texts(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise ValueError("must be NAME: value, a line each")
        for name, text in value.items():
            if not isinstance(name, str) or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
                raise ValueError(f"{name!r} is not the name of an environment variable")
            if isinstance(text, bool) or not isinstance(text, (str, int)):
                raise ValueError(f"{name}: {text!r} is neither a number nor a text; put it in quotes")
        return {name: str(text) for name, text in value.items()}

    def peak(self, precision: str) -> float:
        """FLOP/s at "bf16" or "fp32"."""
        return 1e12 * (self.bf16_tflops if precision == "bf16" else self.fp32_tflops)


def read(path: Path) -> Hardware:
    """A hardware file. Raises Exit (bad usage) when it is missing or not one."""
    try:
        return Hardware.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        known = ", ".join(str(file.relative_to(FOLDER.parents[1])) for file in sorted(FOLDER.glob("*.yaml")))
        raise Exit(f"hardware = {path}: {error.strerror}; there is {known}", USAGE) from None
    except (ValueError, yaml.YAMLError) as error:
        raise Exit(f"hardware = {path}: not a hardware file: {' '.join(str(error).split())}", USAGE) from None


def detect(device: torch.device) -> Hardware | None:
    """The datasheet of this device, if configs/hardware/ has one that matches its name. CPUs have none: they differ too much."""
    if device.type != "cuda":
        return None
    import torch

    return named(torch.cuda.get_device_name(device))


def named(name: str) -> Hardware | None:
    """The file of configs/hardware/ that matches a device's full name."""
    for path in sorted(FOLDER.glob("*.yaml")):
        hardware = read(path)
        if any(part.lower() in name.lower() for part in hardware.match):
            return hardware
    return None


def ceiling(chip: Hardware | None, device: torch.device, precision: str) -> tuple[float, str | None]:
    """FLOP/s that products of "bf16" or "fp32" reach on this device: as the chip's file has it, else measured now.

    The second is None, or why a file's measurement does not hold here: it was taken on another device, or on a CPU with
    another number of threads.
    """
    measured = chip.measured if chip is not None else None
    found = measured.peak(precision) if measured is not None else None
    if measured is None or found is None:
        return measured_peak(device, precision), None
    here, threads = _identity(device)
    if (measured.device, measured.threads) == (here, threads):
        return found, None
    there = measured.device + (f" with {measured.threads} threads" if measured.threads else "")
    this = here + (f" with {threads} threads" if threads else "")
    return measured_peak(device, precision), f"the measured ceilings are of {there}, this is {this}: measured anew"


def _identity(device: torch.device) -> tuple[str, int | None]:
    """(name, threads) of a device, as the benchmark writes them."""
    from kernels.benching.hardware.machine import identity

    return identity(device)


def measured_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product on this device now: the best of several, after a warm-up. Takes well under a second."""
    import torch

    size = 4096 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)  # its own, so that the job's random state stays as it was
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    best = float("inf")
    for attempt in range(8):
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if attempt >= 2:
            best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
