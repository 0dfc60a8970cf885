"""Who this device is, and how large its caches and its free memory are."""

from __future__ import annotations

from pathlib import Path

import torch

from kernels.architecture import architecture, processor

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_CACHE = 64 << 20  # bytes; where the system does not tell
INFINITY_CACHE = (
    256 << 20
)  # bytes; MI300 and MI350 have it on the memory's side of the L2 cache, and no driver reports it


def identity(device: torch.device) -> tuple[str, int | None]:
    """(name, threads): of two devices with equal answers, one's measurements hold for the other. threads: None for GPUs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), None
    return processor(), torch.get_num_threads()


def cache_bytes(device: torch.device) -> int:
    """Bytes of the largest cache between the device's cores and its memory."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found = int(getattr(properties, "L2_cache_size", 0)) or UNKNOWN_CACHE
        return max(found, INFINITY_CACHE) if architecture(device) in ("gfx942", "gfx950") else found
    sizes = [_bytes(path) for path in sorted(CACHES.glob("index*/size"))]
    return max(sizes, default=UNKNOWN_CACHE)


def _bytes(path: Path) -> int:
    """The kernel writes 2048K."""
    try:
        text = path.read_text().strip()
        return int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0)
    except (OSError, ValueError):
        return 0


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated without pushing anybody else out."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _meminfo("MemAvailable")


def total_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return _meminfo("MemTotal")


def _meminfo(key: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 4 << 30
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:")), 4 << 30)
