"""What should be the same on all nodes of a job, and is not."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from typing import Any

from launch.preflight.check import Result, failed, not_checked, passed, warned
from launch.preflight.gpus import inventory
from launch.preflight.node import REPOSITORY, Node
from launch.preflight.packages import SHOWN, installed
from launch.preflight.variables import FAMILIES

# With these, ranks would not understand each other, or not compute the same.
FATAL = ("source", "torch", "NCCL")
SHOW_HOSTS = 6
FLOORS = ("kernels", "parallel", "pretrain", "launch")


def facts(node: Node) -> dict[str, str]:
    """Names and values, all as text."""
    found = inventory(node)
    stages = node.torch().stages
    known = {
        "source": source(),
        "Python": platform.python_version(),
        "kernel": platform.release(),
        "GPUs": f"{len(found.gpus)} x {', '.join(sorted({gpu.name for gpu in found.gpus}))}" if found.gpus else "none",
        "GPU memory": ", ".join(sorted({str(gpu.memory_total) for gpu in found.gpus})),
        "GPU driver": found.driver,
        "NCCL": str(stages.get("devices", {}).get("nccl")),
        "torch": str(stages.get("import", {}).get("version")),
        "CPUs": str(os.cpu_count()),
    }
    known |= {name: installed(name) or "none" for name in SHOWN if name != "torch"}
    return known | {f"${name}": value for name, value in node.environ.items() if FAMILIES.match(name)}


def source() -> str:
    """A hash of this project's Python files: nodes with their own copy of it may have an older one."""
    digest = hashlib.sha256()
    for floor in FLOORS:
        for file in sorted((REPOSITORY / floor).rglob("*.py")):
            digest.update(str(file.relative_to(REPOSITORY)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def compare(by_host: Mapping[str, Mapping[str, Any]]) -> list[Result]:
    """A line for each fact that is not the same everywhere: the commonest value first."""
    if len(by_host) < 2:
        return [not_checked("there is one node only")]
    names = dict.fromkeys(name for known in by_host.values() for name in known)
    results = []
    for name in names:
        hosts: dict[str, list[str]] = {}
        for host, known in by_host.items():
            hosts.setdefault(str(known.get(name, "not set")), []).append(host)
        if len(hosts) == 1:
            continue
        ordered = sorted(hosts.items(), key=lambda item: -len(item[1]))
        shown = "; ".join(f"{value} on {_some(where)}" for value, where in ordered)
        judge = failed if name in FATAL else warned
        results.append(judge(f"not the same everywhere: {shown}", name, hosts=dict(ordered)))
    return results or [passed(f"{len(by_host)} nodes alike in {len(names)} respects")]


def _some(hosts: list[str]) -> str:
    rest = len(hosts) - SHOW_HOSTS
    return ", ".join(hosts[:SHOW_HOSTS]) + (f" and {rest} more" if rest > 0 else "")
