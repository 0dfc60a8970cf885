"""Where and under which load a run was measured."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from typing import Any

import torch
import torch.distributed as dist

from kernels.architecture import processor
from parallel.processes import Processes


def describe(processes: Processes, backend: str, node: int) -> dict[str, Any]:
    """The same on all ranks: collective over the job, where it has several."""
    mine: tuple[str, str, float] = (platform.node(), _device(processes.device), os.getloadavg()[0])
    everyone: list[Any] = [mine]
    if processes.world > 1:
        everyone = [None] * processes.world
        dist.all_gather_object(everyone, mine)
    return {
        "ranks": processes.world,
        "ranks_per_node": node,
        "hosts": list(dict.fromkeys(host for host, _, _ in everyone)),
        "devices": sorted({device for _, device, _ in everyone}),
        "load": round(max(load for _, _, load in everyone), 2),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backend": backend,
        "backend_version": _version(backend),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": shlex.join(["-m", "parallel.bench", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def line(machine: dict[str, Any]) -> str:
    hosts = machine["hosts"]
    where = hosts[0] if len(hosts) == 1 else f"{len(hosts)} hosts ({hosts[0]} ... {hosts[-1]})"
    version = f" {machine['backend_version']}" if machine["backend_version"] else ""
    return (
        f"{machine['ranks']} rank(s) on {where}, {', '.join(machine['devices'])}; {machine['backend']}{version}, "
        f"torch {machine['torch']}; {machine['cores']} cores, load {machine['load']:g}"
    )


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor()


def _version(backend: str) -> str | None:
    if backend in ("nccl", "rccl"):
        return ".".join(map(str, torch.cuda.nccl.version()))
    return None
