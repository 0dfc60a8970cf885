"""What nvidia-smi says, from its XML: the one form in which a driver that lacks a field leaves it out instead of failing."""

from __future__ import annotations

from xml.etree import ElementTree

from launch.preflight.gpus import Gpu, Holder, Inventory, whole
from launch.preflight.node import Node

MIB = 1 << 20
LOST = ("err!", "unknown error", "gpu is lost", "gpu requires reset")
# Reasons of the hardware; power caps and idling are what every GPU does.
SLOWED = {
    "hw_slowdown": "the hardware slows it down",
    "hw_thermal_slowdown": "too hot",
    "hw_power_brake_slowdown": "the power supply slows it down",
    "sw_thermal_slowdown": "hot, slowed by the driver",
}


def find(node: Node) -> Inventory:
    answer = node.run("nvidia-smi", "-q", "-x")
    if answer.absent:
        return Inventory(missing=["nvidia-smi"])
    if not answer.ok:
        return Inventory(trouble=[f"nvidia-smi: {answer.why}"])
    try:
        return parse(answer.out)
    except ElementTree.ParseError as error:
        return Inventory(trouble=[f"nvidia-smi prints no XML: {error}"])


def parse(text: str) -> Inventory:
    """The output of `nvidia-smi -q -x`. Raises ElementTree.ParseError when it is not XML."""
    log = ElementTree.fromstring(text)
    found = Inventory(source="nvidia-smi", driver=_text(log, "driver_version"), cuda=_text(log, "cuda_version"))
    found.gpus = [_gpu(index, node) for index, node in enumerate(log.iter("gpu"))]
    return found


def _gpu(index: int, gpu: ElementTree.Element) -> Gpu:
    bus = gpu.get("id", "").lower()
    domain, _, rest = bus.partition(":")
    used, total = (whole(_text(gpu, f"fb_memory_usage/{name}")) for name in ("used", "total"))
    found = Gpu(
        index, "nvidia", name=_text(gpu, "product_name"), bus=f"{domain[-4:]}:{rest}", uuid=_text(gpu, "uuid"),
        memory_total=None if total is None else total * MIB, memory_used=None if used is None else used * MIB,
        ecc={"Enabled": True, "Disabled": False}.get(_text(gpu, "ecc_mode/current_ecc")),
        clock=whole(_text(gpu, "clocks/sm_clock")), clock_max=whole(_text(gpu, "max_clocks/sm_clock")),
        temperature=whole(_text(gpu, "temperature/gpu_temp")), mig=_text(gpu, "mig_mode/current_mig") == "Enabled",
    )  # fmt: skip
    for name in ("product_name", "fb_memory_usage/total", "temperature/gpu_temp"):
        if any(word in _text(gpu, name).lower() for word in LOST):
            found.lost = f"nvidia-smi gets no answer from it ({_text(gpu, name)})"
    found.corrected, found.uncorrected = _errors(gpu.find("ecc_errors/volatile"))
    _repairs(gpu, found)
    reasons = [part for part in gpu if part.tag in ("clocks_event_reasons", "clocks_throttle_reasons")]
    for part in (reason for group in reasons for reason in group):
        name = part.tag.removeprefix("clocks_event_reason_").removeprefix("clocks_throttle_reason_")
        if name in SLOWED and (part.text or "").strip() == "Active":
            found.slowed += (SLOWED[name],)
    processes = gpu.find("processes")
    if processes is not None and (processes.text or "").strip() in ("", "None"):
        found.holders = tuple(_holder(process) for process in processes.iter("process_info"))
    return found


def _errors(counts: ElementTree.Element | None) -> tuple[int | None, int | None]:
    """(corrected, uncorrected), summed over the parts of the chip; None where no part has a number."""
    corrected: list[int] = []
    uncorrected: list[int] = []
    for part in counts if counts is not None else ():
        count = whole(part.text)
        if count is not None and "correctable" in part.tag:
            (uncorrected if "uncorrectable" in part.tag else corrected).append(count)
    # GPUs before Ampere count single_bit and double_bit errors, each with a total.
    for name, where in (("single_bit/total", corrected), ("double_bit/total", uncorrected)):
        count = None if counts is None else whole(counts.findtext(name))
        if count is not None:
            where.append(count)
    return (sum(corrected) if corrected else None, sum(uncorrected) if uncorrected else None)


def _repairs(gpu: ElementTree.Element, found: Gpu) -> None:
    def yes(name: str) -> bool:
        return _text(gpu, name).lower() == "yes"

    action = _text(gpu, "gpu_recovery_action")
    if yes("remapped_rows/remapped_row_failure") or yes("ecc_errors/unrepairable_memory"):
        found.repair, found.beyond_repair = "a repair of its memory has failed: replace it", True
    elif yes("ecc_errors/aggregate/sram_threshold_exceeded"):
        found.repair, found.beyond_repair = "more on-chip memory errors than it is rated for: replace it", True
    elif yes("remapped_rows/remapped_row_pending") or yes("retired_pages/pending_retirement"):
        found.repair = "a repair of its memory waits for a reset of the GPU"
    elif action not in ("", "None", "N/A", "Unknown"):
        found.repair = f"its driver asks for: {action}"


def _holder(process: ElementTree.Element) -> Holder:
    used = whole(_text(process, "used_memory"))
    pid = whole(_text(process, "pid")) or 0
    return Holder(pid, _text(process, "process_name"), None if used is None else used * MIB)


def _text(node: ElementTree.Element, name: str) -> str:
    return (node.findtext(name) or "").strip()
