"""Checks of the host that read /proc and /sys: limits, memory, CPUs, NUMA, PCI links."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.preflight.check import Check, Result, failed, not_checked, passed, size, warned
from launch.preflight.gpus import inventory, on_bus
from launch.preflight.node import Node
from parallel.cores import members

GIB = 1 << 30
UNLIMITED = resource.RLIM_INFINITY


def limits(node: Node) -> list[Result]:
    fabric = bool(node.folders("sys/class/infiniband"))
    gpu = bool(on_bus(node)) or bool(inventory(node).gpus)
    results = []
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = f"memlock {_limit(soft, size)}"
    if soft == UNLIMITED or soft >= 32 * GIB:
        results.append(passed(text, "memlock", limit=soft))
    elif fabric:
        why = "RDMA cards can register no more than that: ulimit -l unlimited, or LimitMEMLOCK=infinity for the daemon"
        results.append(failed(f"{text}: {why}", "memlock", limit=soft))
    elif gpu:
        results.append(warned(f"{text}: too little once there is an RDMA card", "memlock", limit=soft))
    else:
        results.append(passed(f"{text}; there is no RDMA card that would need more", "memlock", limit=soft))
    for name, number, least, good, why in (
        (
            "nofile",
            resource.RLIMIT_NOFILE,
            4096,
            65536,
            "each connection, shard and loader's worker holds some: ulimit -n",
        ),
        ("nproc", resource.RLIMIT_NPROC, 4096, 32768, "threads count, and each rank has hundreds: ulimit -u"),
    ):
        soft, hard = resource.getrlimit(number)
        text = f"{name} {_limit(soft, str)}"
        if soft != UNLIMITED and soft < good:
            more = f" (up to {_limit(hard, str)} without root)" if hard == UNLIMITED or hard > soft else ""
            judge = failed if soft < least else warned
            results.append(judge(f"{text}, better {good}{more}: {why}", name, limit=soft))
        else:
            results.append(passed(text, name, limit=soft))
    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    pattern = node.read("proc/sys/kernel/core_pattern")
    if soft != 0 and pattern is not None and not pattern.startswith("|"):
        text = f"core {_limit(soft, size)}: each rank that crashes writes its memory to {pattern!r}: ulimit -c 0"
        results.append(warned(text, "core", limit=soft))
    else:
        results.append(passed(f"core {_limit(soft, size)}", "core", limit=soft))
    return results


def _limit(value: int, show: Callable[[int], str]) -> str:
    return "unlimited" if value == UNLIMITED else show(value)


def shm(node: Node) -> list[Result]:
    folder = node.path("dev/shm")
    try:
        found = os.statvfs(folder)
    except OSError as error:
        return [failed(f"/dev/shm: {error.strerror}; NCCL and loaders' workers share memory there")]
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    text = f"/dev/shm has {size(total)}, {size(free)} free"
    hint = "NCCL and loaders' workers share memory there: --shm-size for containers, or remount it with size="
    if free < GIB:
        return [failed(f"{text}: {hint}", total=total, free=free)]
    if free < 8 * GIB:
        return [warned(f"{text}, better 8 GiB: {hint}", total=total, free=free)]
    return [passed(text, total=total, free=free)]


def host_memory(node: Node) -> list[Result]:
    info = {
        match[1]: int(match[2]) << 10
        for line in (node.read("proc/meminfo") or "").splitlines()
        if (match := re.match(r"(\w+):\s+(\d+) kB", line))
    }
    if "MemTotal" not in info or "MemAvailable" not in info:
        return [not_checked("/proc/meminfo does not tell")]
    total, free = info["MemTotal"], info["MemAvailable"]
    text = f"{size(free)} of {size(total)} free"
    group = _cgroup(node, "memory.max")
    allowed = None if group is None else int((node.read(group / "memory.max") or "0").split()[0])
    if group is not None and allowed is not None and allowed < total:
        used = node.number(group / "memory.current") or 0
        free = min(free, allowed - used)
        text += f", {size(allowed)} allowed to this job or container, {size(used)} of it in use"
    swapped = info.get("SwapTotal", 0) - info.get("SwapFree", 0)
    results = []
    gpus = inventory(node).gpus
    needed = sum(gpu.memory_total or 0 for gpu in gpus)
    if free < 2 * GIB or free < 0.05 * total:
        results.append(failed(f"{text}: something else fills it", total=total, free=free))
    elif free < needed:
        why = f"a copy of what the GPUs hold ({size(needed)}), as saves in the background make, may not fit"
        results.append(warned(f"{text}; {why}", total=total, free=free))
    else:
        results.append(passed(text, total=total, free=free))
    if swapped > GIB:
        results.append(
            warned(f"{size(swapped)} are swapped out: something has filled the memory", "swap", swapped=swapped)
        )
    return results


def cpus(node: Node) -> list[Result]:
    online = members(node.read("sys/devices/system/cpu/online") or "")
    allowed = _allowed(node, "Cpus_allowed_list")
    if not online or allowed is None:
        return [not_checked("the kernel does not tell which CPUs there are")]
    count = len(online & allowed) or len(allowed)
    text = f"{count} of {len(online)} CPUs may be used"
    results = []
    group = _cgroup(node, "cpu.max")
    quota = ("" if group is None else node.read(group / "cpu.max") or "").split()
    if len(quota) == 2:
        share = int(quota[0]) / int(quota[1])
        if share < count:
            why = f"and only {share:g} of them at a time (a container's quota): threads beyond that are stopped again and again"
            results.append(warned(f"{text}, {why}", allowed=count, online=len(online), quota=share))
    gpus = len(inventory(node).gpus)
    if gpus and count < 2 * gpus:
        results.append(
            warned(f"{text}, for {gpus} GPUs: each rank wants two or more", allowed=count, online=len(online))
        )
    governors = sorted(
        {g for cpu in online if (g := node.read(f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor"))}
    )
    if gpus and governors and governors != ["performance"]:
        why = "cores that must wake up first delay each launch of a kernel; set it to performance"
        results.append(warned(f"frequency governor {', '.join(governors)}: {why}", "governor", governors=governors))
    return results or [passed(text, allowed=count, online=len(online), governors=governors)]


def numa(node: Node) -> list[Result]:
    folders = [folder for folder in node.folders("sys/devices/system/node") if re.fullmatch(r"node\d+", folder.name)]
    if not folders:
        return [not_checked("the kernel shows no NUMA nodes")]
    memory = {}
    for folder in folders:
        match = re.search(r"MemTotal:\s+(\d+) kB", node.read(folder / "meminfo") or "")
        memory[folder.name] = int(match[1]) << 10 if match else 0
    balancing = node.number("proc/sys/kernel/numa_balancing")
    values: dict[str, Any] = {"nodes": len(folders), "balancing": balancing, "memory": memory}
    shown = ", ".join(size(count) for count in memory.values())
    text = f"{len(folders)} node(s) with {shown}" + (
        "" if balancing is None else f", balancing {'on' if balancing else 'off'}"
    )
    if len(folders) == 1:
        return [passed(text, **values)]
    results = []
    if balancing:
        why = (
            "pages are unmapped to see who uses them, which stalls ranks and their DMA: sysctl kernel.numa_balancing=0"
        )
        results.append(warned(f"{text}: {why}", **values))
    banked = [count for count in memory.values() if count]
    if banked and min(banked) < 0.7 * max(banked):
        results.append(warned(f"{text}: uneven, as after the loss of a memory module", "memory", **values))
    allowed = _allowed(node, "Mems_allowed_list")
    if allowed is not None and len(allowed & {int(folder.name[4:]) for folder in folders}) < len(folders):
        why = "ranks on the other nodes reach their memory across the socket"
        results.append(warned(f"memory of node(s) {sorted(allowed)} only may be used: {why}", "allowed", **values))
    astray = [bus for _, bus in on_bus(node) if node.number(f"sys/bus/pci/devices/{bus}/numa_node") in (-1, None)]
    if astray:
        why = "the firmware does not tell, so ranks cannot be placed beside them"
        results.append(warned(f"no NUMA node known for the GPU(s) at {', '.join(astray)}: {why}", "gpus", **values))
    return results or [passed(text, **values)]


def pci(node: Node) -> list[Result]:
    """Links that were trained to fewer lanes than both ends have, and errors that devices have counted."""
    cards = {bus: f"gpu at {bus}" for _, bus in on_bus(node)}
    for folder in [*node.folders("sys/class/infiniband"), *node.folders("sys/class/net")]:
        device = (folder / "device").resolve()
        if (device / "current_link_width").exists():
            cards.setdefault(device.name, folder.name)
    known, results = 0, []
    for bus, subject in cards.items():
        folder = node.path("sys/bus/pci/devices") / bus
        width, most = node.number(folder / "current_link_width"), node.number(folder / "max_link_width")
        fatal, light = (_errors(node, folder / f"aer_dev_{kind}") for kind in ("fatal", "nonfatal"))
        if not width and fatal is None:
            continue
        known += 1
        values = {"width": width, "most": most, "fatal": fatal, "nonfatal": light}
        if fatal:
            results.append(failed(f"{fatal} fatal PCIe error(s) since the start", subject, **values))
        elif light:
            results.append(warned(f"{light} uncorrected PCIe error(s) since the start", subject, **values))
        if width and most and width < most:
            results.append(warned(f"PCIe link of {width} lanes, it has {most}: seat it again", subject, **values))
    if not known:
        return [not_checked("no GPU or network card whose PCI link can be seen")]
    return results or [passed(f"{known} card(s) with all their lanes, no uncorrected errors", count=known)]


def iommu(node: Node) -> list[Result]:
    vendors = {vendor for vendor, _ in on_bus(node)}
    line = node.read("proc/cmdline")
    if "amd" not in vendors:
        return [not_checked("matters for AMD's GPUs, and there is none on the PCI bus")]
    if line is None:
        return [not_checked("/proc/cmdline cannot be read")]
    groups = len(node.folders("sys/kernel/iommu_groups"))
    words = line.split()
    if not groups:
        return [passed("the IOMMU is off")]
    if "iommu=pt" in words or "iommu.passthrough=1" in words:
        return [passed("the IOMMU passes addresses through (iommu=pt)")]
    return [warned("the IOMMU translates what GPUs send each other: boot with iommu=pt, as RCCL asks for", line=line)]


def _cgroup(node: Node, name: str) -> Path | None:
    """The nearest control group around this process that sets a number in the file `name`; a container's, or a Slurm job's."""
    own = next((line[3:] for line in (node.read("proc/self/cgroup") or "").splitlines() if line.startswith("0::")), "/")
    top = node.path("sys/fs/cgroup")
    place = top / own.strip("/")
    for folder in (place, *place.parents):
        if (node.read(folder / name) or "max")[0].isdigit():
            return folder
        if folder == top:
            break
    return None


def _allowed(node: Node, name: str) -> set[int] | None:
    match = re.search(rf"^{name}:\s*(\S+)", node.read("proc/self/status") or "", re.MULTILINE)
    return None if match is None else members(match[1])


def _errors(node: Node, path: Path) -> int | None:
    """The sum at the end of a device's list of PCIe errors."""
    match = re.search(r"TOTAL_ERR_\w+ (\d+)", node.read(path) or "")
    return None if match is None else int(match[1])


CHECKS = (
    Check("limits", "ulimits: memlock, nofile, nproc, core", limits),
    Check("shm", "size of /dev/shm", shm),
    Check("host_memory", "memory of the host: total, free, what a container is allowed, swap", host_memory),
    Check("cpus", "CPUs that a job may use, quotas of containers, frequency governor", cpus),
    Check("numa", "NUMA nodes and their memory, automatic balancing, where the GPUs are", numa),
    Check("pci", "lanes and error counts of the PCIe links of GPUs and network cards", pci),
    Check("iommu", "whether the IOMMU translates traffic between AMD GPUs", iommu),
)
