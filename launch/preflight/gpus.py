"""The GPUs of a node as their drivers' tools describe them, whoever made them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple

from launch.preflight.node import Node

VENDORS = {"0x10de": "nvidia", "0x1002": "amd"}
# PCI classes: VGA, 3D and other display controllers (MI300X is one of these), processing accelerators.
CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")


class Holder(NamedTuple):
    """A process that uses a GPU. bytes: of the GPU's memory, where known."""

    pid: int
    name: str
    bytes: int | None


@dataclass
class Gpu:
    """None and empty texts: the tools do not say."""

    index: int
    vendor: str
    name: str = ""
    bus: str = ""
    """PCI address as in /sys/bus/pci/devices: 0000:0c:00.0."""
    uuid: str = ""
    lost: str = ""
    """Why the tools get no answer from it."""
    memory_total: int | None = None
    memory_used: int | None = None
    ecc: bool | None = None
    """Whether error correction is on."""
    corrected: int | None = None
    """Memory errors since the driver was loaded: corrected, and those that were not."""
    uncorrected: int | None = None
    repair: str = ""
    """A repair of memory that waits for a reset, or that failed."""
    beyond_repair: bool = False
    clock: float | None = None
    """MHz of the compute units, and what they may reach."""
    clock_max: float | None = None
    temperature: float | None = None
    slowed: tuple[str, ...] = ()
    """Reasons of the hardware for which it runs more slowly than it could."""
    mig: bool = False
    holders: tuple[Holder, ...] | None = None

    @property
    def subject(self) -> str:
        return f"gpu {self.index}"


@dataclass
class Inventory:
    gpus: list[Gpu] = field(default_factory=list)
    source: str = ""
    """The tool that has listed them."""
    driver: str = ""
    cuda: str = ""
    """The newest CUDA version that the driver can serve."""
    missing: list[str] = field(default_factory=list)
    """Tools that are not installed."""
    trouble: list[str] = field(default_factory=list)
    """Tools that are there and failed."""
    seconds: float = 0.0
    holders: list[Holder] | None = None
    """Processes that use some GPU, where the tools do not say which."""


def inventory(node: Node) -> Inventory:
    """The GPUs, by the first vendor whose tools or driver list any. Asked once a node."""
    return node.once("gpus", lambda: _inventory(node))


def _inventory(node: Node) -> Inventory:
    from launch.preflight import amd, nvidia

    start = time.monotonic()
    missing: list[str] = []
    trouble: list[str] = []
    for find in (nvidia.find, amd.find):
        found = find(node)
        trouble += found.trouble
        if found.gpus:
            found.trouble = trouble
            found.seconds = time.monotonic() - start
            return found
        missing += found.missing
    return Inventory(missing=missing, trouble=trouble, seconds=time.monotonic() - start)


def on_bus(node: Node) -> list[tuple[str, str]]:
    """(vendor, PCI address) of each GPU that is plugged in, whether or not a driver serves it."""
    found = []
    for device in node.folders("sys/bus/pci/devices"):
        vendor = VENDORS.get(node.read(device / "vendor") or "")
        if vendor and (node.read(device / "class") or "")[:6] in CLASSES:
            found.append((vendor, device.name))
    return found


def none_found(node: Node) -> str:
    """Why nothing can be said about GPUs, in words."""
    found = inventory(node)
    plugged = on_bus(node)
    what = f"{len(plugged)} GPU(s) on the PCI bus" if plugged else "no GPU on the PCI bus"
    if found.trouble:
        return f"{what}; {'; '.join(found.trouble)}"
    if found.missing:
        return f"{what}, {'but' if plugged else 'and'} no {' or '.join(found.missing)} is installed"
    return f"{what}, and the tools list none"


def whole(text: str | None) -> int | None:
    """The whole number that a text begins with: "81559 MiB" -> 81559; None for "N/A" and the like."""
    words = (text or "").replace(",", "").split()
    try:
        return int(float(words[0])) if words else None
    except ValueError:
        return None
