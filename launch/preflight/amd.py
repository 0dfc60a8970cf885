"""AMD's GPUs, from the kernel driver's files in /sys, and from amd-smi or rocm-smi for what these do not tell."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.preflight.gpus import Gpu, Holder, Inventory, on_bus, whole
from launch.preflight.node import Node

COUNTS = re.compile(r"\b(ue|ce)\s*:\s*(\d+)")


def find(node: Node) -> Inventory:
    plugged = [bus for vendor, bus in on_bus(node) if vendor == "amd"]
    folders = {bus: Path("sys/bus/pci/devices") / bus for bus in plugged}
    # What the driver has not taken on has none of its files.
    served = [bus for bus in plugged if (node.root / folders[bus] / "mem_info_vram_total").exists()]
    found = Inventory(driver=node.read("sys/module/amdgpu/version") or "")
    if served:
        found.source = "the amdgpu driver"
        found.gpus = [_gpu(node, index, bus, folders[bus]) for index, bus in enumerate(served)]
    found.missing = _tools(node, found)
    if found.gpus and (node.root / "sys/class/kfd/kfd").exists():
        found.holders = [_holder(node, folder) for folder in node.folders("sys/class/kfd/kfd/proc")]
    return found


def _gpu(node: Node, index: int, bus: str, folder: Path) -> Gpu:
    gpu = Gpu(index, "amd", name=node.read(folder / "product_name") or "", bus=bus)
    gpu.memory_total = node.number(folder / "mem_info_vram_total")
    gpu.memory_used = node.number(folder / "mem_info_vram_used")
    gpu.uuid = node.read(folder / "unique_id") or ""
    gpu.clock, gpu.clock_max = _clocks(node.read(folder / "pp_dpm_sclk"))
    blocks = [node.read(path) or "" for path in node.folders(str(folder / "ras")) if path.name.endswith("_err_count")]
    counts = [(kind, int(count)) for text in blocks for kind, count in COUNTS.findall(text)]
    if counts:
        gpu.ecc = True
        gpu.corrected = sum(count for kind, count in counts if kind == "ce")
        gpu.uncorrected = sum(count for kind, count in counts if kind == "ue")
    # A line a page of memory that was taken out of use: address : size : R (retired), P (waits for it), F (failed).
    pages = (node.read(folder / "ras" / "gpu_vram_bad_pages") or "").splitlines()
    states = [line.rsplit(":", 1)[-1].strip() for line in pages]
    if states.count("F"):
        gpu.repair, gpu.beyond_repair = (
            f"{states.count('F')} bad page(s) of its memory could not be taken out of use",
            True,
        )
    elif states.count("P"):
        gpu.repair = f"{states.count('P')} bad page(s) of its memory wait for a reset of the GPU"
    inputs = sorted(path for path in (node.root / folder).glob("hwmon/hwmon*/temp*_input"))
    degrees = [value for path in inputs if (value := node.number(path)) is not None]
    gpu.temperature = max(degrees) / 1000 if degrees else None
    return gpu


def _clocks(text: str | None) -> tuple[float | None, float | None]:
    """(now, most) in MHz from the driver's table, where a star marks the present one."""
    rates = [
        (float(match[1]), "*" in line) for line in (text or "").splitlines() if (match := re.search(r"(\d+)\s*M", line))
    ]
    now = next((rate for rate, here in rates if here), None)
    return now, max((rate for rate, _ in rates), default=None)


def _holder(node: Node, folder: Path) -> Holder:
    pid = int(folder.name) if folder.name.isdigit() else 0
    used = [value for path in folder.glob("vram_*") if (value := node.number(path)) is not None]
    return Holder(pid, node.read(f"proc/{pid}/comm") or "", sum(used) if used else None)


def _tools(node: Node, found: Inventory) -> list[str]:
    """Adds what amd-smi, or else rocm-smi, has to say; returns which of them are not installed."""
    missing = []
    for name, (read, commands) in TOOLS.items():
        answers = [node.run(name, *options) for options in commands]
        if answers[0].absent:
            missing.append(name)
            continue
        bad = next((answer for answer in answers if not answer.ok), None)
        if bad is not None:
            found.trouble.append(f"{name}: {bad.why}")
            continue
        try:
            read([json.loads(answer.out) for answer in answers], found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            found.trouble.append(f"{name} prints what this does not understand: {type(error).__name__}: {error}")
            continue
        found.source = name
        return []
    return missing


def _of(found: Inventory, bus: str, index: int) -> Gpu:
    """The GPU at a PCI address, or else of an index; a new one when the driver's files are out of sight."""
    for gpu in found.gpus:
        if gpu.bus == bus.lower() or (not bus and gpu.index == index):
            return gpu
    gpu = Gpu(index, "amd", bus=bus.lower())
    found.gpus.append(gpu)
    return gpu


def _amd_smi(said: list[Any], found: Inventory) -> None:
    # A list of GPUs, which newer versions wrap once more.
    static, metric = (answer["gpu_data"] if isinstance(answer, dict) else answer for answer in said)
    by_index = {row["gpu"]: row for row in metric}
    for row in static:
        gpu = _of(found, str(row.get("bus", {}).get("bdf", "")), row["gpu"])
        gpu.name = str(row.get("asic", {}).get("market_name") or gpu.name)
        more = by_index.get(row["gpu"], {})
        errors = more.get("ecc", {})
        corrected, uncorrected = (
            whole(str(errors.get(f"total_{kind}_count"))) for kind in ("correctable", "uncorrectable")
        )
        gpu.corrected = gpu.corrected if corrected is None else corrected
        gpu.uncorrected = gpu.uncorrected if uncorrected is None else uncorrected
        usage = more.get("mem_usage", {})
        for ours, theirs in (("memory_total", "total_vram"), ("memory_used", "used_vram")):
            value = usage.get(theirs, {})
            mib = whole(str(value.get("value"))) if isinstance(value, dict) else None
            if getattr(gpu, ours) is None and mib is not None:
                setattr(gpu, ours, mib << 20)


def _rocm_smi(said: list[Any], found: Inventory) -> None:
    cards = {name: card for name, card in said[0].items() if name.startswith("card")}
    for name, card in sorted(cards.items(), key=lambda item: int(item[0][4:])):
        gpu = _of(found, card.get("PCI Bus", ""), int(name[4:]))
        # The capital letters of these names differ between versions.
        lower = {key.lower(): value for key, value in card.items()}
        gpu.name = lower.get("card series") or gpu.name
        total, used = lower.get("vram total memory (b)"), lower.get("vram total used memory (b)")
        gpu.memory_total = gpu.memory_total if total is None else int(total)
        gpu.memory_used = gpu.memory_used if used is None else int(used)
    found.driver = found.driver or said[0].get("system", {}).get("Driver version", "")


# Each tool with who reads it and what it is asked.
TOOLS: dict[str, tuple[Callable[[list[Any], Inventory], None], list[tuple[str, ...]]]] = {
    "amd-smi": (_amd_smi, [("static", "--asic", "--bus", "--json"), ("metric", "--ecc", "--mem-usage", "--json")]),
    "rocm-smi": (
        _rocm_smi,
        [("--showproductname", "--showbus", "--showmeminfo", "vram", "--showdriverversion", "--json")],
    ),
}
