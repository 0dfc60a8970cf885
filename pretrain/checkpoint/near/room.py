"""How much may be written to a near folder before something else suffers."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

_IN_MEMORY = ("tmpfs", "ramfs")


def free_bytes(folder: Path) -> int:
    """What the filesystem has left; if it lives in memory, no more than nine tenths of what machine and job have left there."""
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if _kind(folder) not in _IN_MEMORY:
        return free
    return min(free, *(left * 9 // 10 for left in (psutil.virtual_memory().available, *_cgroups())))


def _kind(folder: Path) -> str:
    """The filesystem's type; "" if this system does not tell."""
    device = folder.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(" - ")[1].split()[0] for line in lines if line.split()[2] == wanted), "")


def _cgroups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What the control groups (version 2) of this process have left: their limits hold for files in memory, too."""
    left = []
    try:
        path = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if (folder / "memory.max").exists() and (limit := (folder / "memory.max").read_text().strip()) != "max":
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
                left.append(max(0, int(limit) - used))
            if folder == root:
                break
    except (OSError, ValueError, StopIteration):
        pass  # no such limits here, or none that can be read
    return left
