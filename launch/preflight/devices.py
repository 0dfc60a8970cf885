"""Checks of the GPUs by what their tools and drivers say: all there, healthy, unhindered, and free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from launch.preflight.check import Check, Result, failed, not_checked, passed, size, warned
from launch.preflight.gpus import Gpu, Inventory, inventory, none_found, on_bus
from launch.preflight.node import Node

GIB = 1 << 30
SLOW_TOOL = 10.0  # seconds; nvidia-smi takes two where a driver is well
HOT = 90.0  # degrees Celsius at rest
OFTEN = 1000  # corrected errors since the driver was loaded: a part that is about to fail
IN_USE_FAIL, IN_USE_WARN = 2 * GIB, GIB  # drivers and screens take some hundred MiB


def devices(node: Node) -> list[Result]:
    found = inventory(node)
    expected = _expected(node)
    if not found.gpus:
        if expected:
            return [failed(f"{expected} GPU(s) expected, none found: {none_found(node)}", expected=expected)]
        if found.trouble and on_bus(node):
            return [failed(none_found(node))]
        return [not_checked(none_found(node))]
    names = sorted({gpu.name or "of unknown name" for gpu in found.gpus})
    count = len(found.gpus)
    text = f"{count} x {', '.join(names)} ({found.source})"
    values: dict[str, Any] = {"count": count, "names": [gpu.name for gpu in found.gpus], "seconds": found.seconds}
    plugged = sum(vendor == found.gpus[0].vendor for vendor, _ in on_bus(node))
    results = []
    if expected is not None and count != expected:
        results.append((failed if count < expected else warned)(f"{text}; {expected} expected", **values))
    elif plugged > count and expected is None:
        results.append(
            warned(
                f"{text}, but {plugged} on the PCI bus: some have failed, or only these were given to this "
                "container; say --gpus N for how many there must be",
                **values,
            )
        )
    elif len(names) > 1:
        results.append(warned(f"{text}: the slowest will set the pace", **values))
    else:
        results.append(passed(text, **values))
    results += [failed(gpu.lost, gpu.subject) for gpu in found.gpus if gpu.lost]
    results += [warned("in MIG mode: a job gets a slice of it", gpu.subject) for gpu in found.gpus if gpu.mig]
    results += [warned(f"a tool fails: {trouble}", "tools") for trouble in found.trouble]
    if found.seconds > SLOW_TOOL:
        results.append(warned(f"{found.source} took {found.seconds:.0f} s: a driver that is about to hang", "tools"))
    return results


def _expected(node: Node) -> int | None:
    if node.expected_gpus is not None:
        return node.expected_gpus
    given = node.environ.get("SLURM_GPUS_ON_NODE", "")
    return int(given) if given.isdigit() else None


def gpu_memory(node: Node) -> list[Result]:
    most = max((gpu.memory_total or 0 for gpu in inventory(node).gpus), default=0)

    def judge(gpu: Gpu) -> Result | None:
        if gpu.memory_used is None or gpu.memory_total is None:
            return not_checked("its tools do not tell its memory", gpu.subject)
        text = f"{size(gpu.memory_used)} of {size(gpu.memory_total)} in use"
        if gpu.memory_used >= IN_USE_FAIL:
            return failed(f"{text} before the job: end what holds it (see foreign_processes)", gpu.subject)
        if gpu.memory_used >= IN_USE_WARN:
            return warned(f"{text} before the job", gpu.subject)
        if gpu.memory_total < 0.99 * most:
            return warned(f"{text}; another GPU here has {size(most)}", gpu.subject)
        return None

    used = max((gpu.memory_used or 0 for gpu in inventory(node).gpus), default=0)
    good = f"{size(most)} each, at most {size(used)} in use"
    return _each(node, judge, good, lambda gpu: {"total": gpu.memory_total, "used": gpu.memory_used})


def ecc(node: Node) -> list[Result]:
    def judge(gpu: Gpu) -> Result | None:
        if gpu.beyond_repair:
            return failed(gpu.repair, gpu.subject)
        if gpu.uncorrected:
            return failed(
                f"{gpu.uncorrected} uncorrected memory error(s): reset it, replace it if more come", gpu.subject
            )
        if gpu.repair:
            return warned(gpu.repair, gpu.subject)
        if gpu.ecc is False:
            return warned("error correction is off: flipped bits go unnoticed", gpu.subject)
        if gpu.corrected is None and gpu.uncorrected is None:
            return not_checked("its tools and driver show no error counts", gpu.subject)
        if gpu.corrected is not None and gpu.corrected >= OFTEN:
            return warned(f"{gpu.corrected} corrected memory errors: it is wearing out", gpu.subject)
        return None

    corrected = sum(gpu.corrected or 0 for gpu in inventory(node).gpus)
    values = lambda gpu: {"corrected": gpu.corrected, "uncorrected": gpu.uncorrected, "repair": gpu.repair}  # noqa: E731
    return _each(node, judge, f"no uncorrected memory errors, {corrected} corrected", values)


def clocks(node: Node) -> list[Result]:
    gpus = inventory(node).gpus
    most = max((gpu.clock_max or 0 for gpu in gpus), default=0)

    def judge(gpu: Gpu) -> Result | None:
        if gpu.slowed:
            return warned(f"slowed: {', '.join(gpu.slowed)}", gpu.subject)
        if gpu.temperature is not None and gpu.temperature >= HOT:
            return warned(f"{gpu.temperature:.0f} C before any work: look at its cooling", gpu.subject)
        if gpu.clock_max is None:
            return not_checked("its tools do not tell its clocks", gpu.subject)
        if gpu.clock_max < most:
            return warned(
                f"may reach {gpu.clock_max:.0f} MHz, another GPU here {most:.0f}: unlock its clocks", gpu.subject
            )
        return None

    hottest = max((gpu.temperature for gpu in gpus if gpu.temperature is not None), default=None)
    good = f"up to {most:.0f} MHz, not slowed" + ("" if hottest is None else f", at most {hottest:.0f} C")
    values = lambda gpu: {"mhz": gpu.clock, "most_mhz": gpu.clock_max, "celsius": gpu.temperature}  # noqa: E731
    return _each(node, judge, good, values)


def foreign_processes(node: Node) -> list[Result]:
    found = inventory(node)
    if not found.gpus:
        return [not_checked(none_found(node))]
    known = [(gpu.subject, holder) for gpu in found.gpus for holder in gpu.holders or ()]
    known += [("", holder) for holder in found.holders or ()]
    if not known and found.holders is None and all(gpu.holders is None for gpu in found.gpus):
        return [not_checked("the tools here do not list processes")]
    results = []
    for subject, holder in known:
        text = f"process {holder.pid} ({holder.name or 'name not visible'})"
        values = {"pid": holder.pid, "name": holder.name, "bytes": holder.bytes}
        if holder.bytes is not None and holder.bytes < 256 << 20:
            results.append(warned(f"{text} is on it, with {size(holder.bytes)}", subject, **values))
        else:
            share = "" if holder.bytes is None else f" with {size(holder.bytes)}"
            results.append(failed(f"{text} uses it{share}: end it, or it slows this job", subject, **values))
    return results or [passed("no other process is on the GPUs, as far as can be seen from here")]


def driver(node: Node) -> list[Result]:
    found = inventory(node)
    if not found.gpus:
        return [not_checked(none_found(node))]
    if not found.driver:
        return [not_checked(f"{found.source} does not tell the driver's version")]
    text = f"{found.gpus[0].vendor} driver {found.driver}" + (f", for CUDA up to {found.cuda}" if found.cuda else "")
    rocm = node.read("opt/rocm/.info/version")
    if found.gpus[0].vendor == "amd" and rocm:
        text += f", ROCm {rocm}"
    loaded = (node.read("proc/driver/nvidia/version") or "").splitlines()
    if found.gpus[0].vendor == "nvidia" and loaded and found.driver not in loaded[0]:
        return [failed(f"{text}, but the kernel has loaded another: {loaded[0].strip()}; restart the node")]
    return [passed(text, driver=found.driver, cuda=found.cuda, rocm=rocm)]


def host_ecc(node: Node) -> list[Result]:
    controllers = [folder for folder in node.folders("sys/devices/system/edac/mc") if folder.name.startswith("mc")]
    results, corrected, known = [], 0, 0
    for folder in controllers:
        ce, ue = node.number(folder / "ce_count"), node.number(folder / "ue_count")
        if ce is None and ue is None:
            continue
        known += 1
        corrected += ce or 0
        if ue:
            results.append(
                failed(f"{ue} uncorrected memory error(s) since the start", folder.name, corrected=ce, uncorrected=ue)
            )
        elif ce is not None and ce >= OFTEN:
            results.append(warned(f"{ce} corrected memory errors: a module is wearing out", folder.name, corrected=ce))
    if not known:
        return [
            not_checked("the kernel shows no error counts of the host's memory (no EDAC driver, or inside a container)")
        ]
    return results or [
        passed(f"{known} memory controller(s): none uncorrected, {corrected} corrected", corrected=corrected)
    ]


def _each(
    node: Node, judge: Callable[[Gpu], Result | None], good: str, values: Callable[[Gpu], dict[str, Any]]
) -> list[Result]:
    """A line for each GPU that is not well, and one for all that are."""
    found: Inventory = inventory(node)
    if not found.gpus:
        return [not_checked(none_found(node))]
    told, well = [], []
    for gpu in found.gpus:
        result = not_checked(gpu.lost, gpu.subject) if gpu.lost else judge(gpu)
        if result is None:
            well.append(gpu)
        else:
            told.append(Result(result.status, result.text, result.subject, values(gpu)))
    if well:
        subject = f"{len(well)} GPU(s)" if told else "all GPUs"
        told.append(passed(good, subject, gpus={str(gpu.index): values(gpu) for gpu in well}))
    return told


CHECKS = (
    Check(
        "devices",
        "GPUs on the PCI bus, in nvidia-smi, amd-smi or rocm-smi; how many, which, and whether they answer",
        devices,
    ),
    Check("gpu_memory", "memory of each GPU, and how much of it is taken before the job begins", gpu_memory),
    Check("ecc", "memory errors that the GPUs have counted (ECC, RAS), repairs that wait or have failed", ecc),
    Check("host_ecc", "memory errors that the kernel has counted for the host (EDAC)", host_ecc),
    Check("clocks", "clocks that the GPUs may reach, what slows them, how hot they are", clocks),
    Check("foreign_processes", "processes that use the GPUs already", foreign_processes),
    Check("driver", "version of the GPU driver, of what is loaded and what is installed", driver),
)
