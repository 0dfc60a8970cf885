"""What the kernel has lately said about GPUs, memory, links and disks."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from launch.preflight.check import Check, Result, Status, not_checked, passed
from launch.preflight.node import Node

LINE = re.compile(r"^\[\s*(\d+\.\d+)\]\s*(?:\S+ kernel: )?(.*)$")
XID = re.compile(r"NVRM: Xid \(([^)]*)\): (\d+)")
# Of NVIDIA's numbered reports; all others are passed on as warnings.
XIDS: dict[int, tuple[Status, str]] = {
    13: ("warn", "a kernel of the program has failed"),
    31: ("warn", "a page fault: mostly the program's"),
    43: ("warn", "a program has stopped it"),
    45: ("warn", "a program was ended"),
    48: ("fail", "an uncorrected memory error"),
    62: ("fail", "its microcontroller has halted"),
    63: ("warn", "a repair of its memory was noted, and waits for a reset"),
    64: ("fail", "a repair of its memory has failed"),
    74: ("fail", "an error of an NVLink"),
    79: ("fail", "it has fallen off the bus"),
    92: ("warn", "many corrected memory errors"),
    94: ("warn", "an uncorrected memory error that stayed within one program"),
    95: ("fail", "an uncorrected memory error that did not stay within one program"),
    119: ("fail", "its system processor does not answer"),
    120: ("fail", "its system processor has failed"),
    140: ("fail", "an uncorrected memory error"),
    143: ("fail", "its link did not come up"),
    149: ("fail", "an error of an NVLink"),
}


class Sign(NamedTuple):
    pattern: re.Pattern[str]
    status: Status
    meaning: str


def _sign(pattern: str, status: Status, meaning: str) -> Sign:
    return Sign(re.compile(pattern, re.IGNORECASE), status, meaning)


# The first that matches a line counts.
SIGNS = (
    _sign(
        r"amdgpu.*(uncorrectable hardware errors? detected|fatal error|poison)",
        "fail",
        "uncorrected error of an AMD GPU",
    ),
    _sign(r"amdgpu.*(gpu reset|ring \S+ timeout|hang(ed)?\b|device lost)", "fail", "an AMD GPU hung or was reset"),
    _sign(r"amdgpu.*correctable hardware errors? detected", "warn", "corrected error of an AMD GPU"),
    _sign(r"amdgpu.*(xgmi|wafl).*(error|fail)", "fail", "error of a link between AMD GPUs"),
    _sign(r"amdgpu.*page fault", "warn", "page fault on an AMD GPU: mostly the program's"),
    _sign(r"(NVRM|nvidia).*(nvlink|nvswitch).*(error|fatal|down)", "fail", "error of an NVLink"),
    _sign(r"nvidia-nvswitch.*SXid", "fail", "error of an NVSwitch"),
    _sign(r"NVRM:.*(fallen off the bus|failed to init|RmInitAdapter failed)", "fail", "an NVIDIA GPU does not answer"),
    _sign(r"(AER|PCIe Bus Error).*(uncorrect|fatal)", "fail", "uncorrected PCIe error"),
    _sign(r"(AER|PCIe Bus Error).*corrected", "warn", "corrected PCIe error"),
    _sign(r"pcieport.*link (is )?down", "fail", "a PCIe link went down"),
    _sign(
        r"EDAC.*\bUE\b|uncorrected hardware memory error|Hardware memory error.*fatal",
        "fail",
        "uncorrected memory error",
    ),
    _sign(r"EDAC.*\bCE\b", "warn", "corrected memory error"),
    _sign(r"\[Hardware Error\]|machine check events? logged|mce: .*(error|bank)", "warn", "hardware error of the host"),
    _sign(r"NETDEV WATCHDOG|transmit queue \d+ timed out|firmware.*(fatal|assert)", "fail", "a network card hung"),
    _sign(
        r"(mlx5|bnxt_en|ionic|ice|i40e|ixgbe|\bib_).*link.*\bdown\b|NIC link is down",
        "warn",
        "a network link went down",
    ),
    _sign(r"nvme.*(timeout|controller is down|I/O error)|blk_update_request|I/O error, dev", "fail", "error of a disk"),
    _sign(r"(EXT4|XFS|BTRFS).*(error|corrupt|shutdown)|remounting filesystem read-only", "fail", "damaged filesystem"),
    _sign(r"nfs: server .* not responding|Lustre(Error)?:.*(timed out|lost|evicted)", "warn", "a file server was away"),
    _sign(r"out of memory: kill|oom-kill", "warn", "the memory was full, and a process was killed"),
    _sign(r"blocked for more than \d+ seconds", "warn", "a process hung inside the kernel"),
    _sign(r"soft lockup|hard lockup|rcu.*stall|kernel BUG|BUG: unable to handle", "fail", "the kernel is unwell"),
    _sign(r"(cpu|core|package).*(clock|temperature).*throttled|critical temperature", "warn", "too hot"),
)


def kernel_log(node: Node) -> list[Result]:
    text, why = _log(node)
    if text is None:
        return [not_checked(why)]
    up = node.uptime()
    lines = [(float(match[1]), match[2]) for line in text.splitlines() if (match := LINE.match(line))]
    end = up if up is not None else max((when for when, _ in lines), default=0.0)
    recent = [(when, said) for when, said in lines if when >= end - 60 * node.since]
    found: dict[tuple[Status, str], list[tuple[float, str]]] = {}
    for when, said in recent:
        if (sign := judge(said)) is not None:
            found.setdefault(sign, []).append((when, said))
    results = []
    for (status, meaning), cases in found.items():
        when, said = cases[-1]
        ago = max(0.0, (end - when) / 60)
        text = f"{meaning}: {len(cases)} line(s), the last {ago:.0f} min ago: {said.strip()[:160]}"
        results.append(Result(status, text, values={"lines": len(cases), "last": said.strip(), "minutes_ago": ago}))
    if results:
        return results
    since = f"{node.since:g} min" if end > 60 * node.since else f"{end / 60:.0f} min since the start"
    return [passed(f"no errors of GPUs, memory, links or disks among {len(recent)} line(s) of the last {since}")]


def judge(line: str) -> tuple[Status, str] | None:
    """How bad a line of the kernel's log is, and what it means; None when it is of no interest."""
    if match := XID.search(line):
        number = int(match[2])
        status, meaning = XIDS.get(number, ("warn", "see NVIDIA's list"))
        return status, f"Xid {number} of the GPU at {match[1].removeprefix('PCI:')}, {meaning}"
    return next(((sign.status, sign.meaning) for sign in SIGNS if sign.pattern.search(line)), None)


def _log(node: Node) -> tuple[str | None, str]:
    """Lines "[seconds since the start] text", or None and the reason."""
    reasons = []
    try:
        text = _kmsg(node)
        if text:
            return text, ""
        reasons.append("/dev/kmsg is empty")
    except OSError as error:
        reasons.append(f"/dev/kmsg: {error.strerror}")
    for command in (("dmesg",), ("journalctl", "--dmesg", "--output", "short-monotonic", "--no-pager", "--quiet")):
        answer = node.run(*command)
        if answer.ok and any(LINE.match(line) for line in answer.out.splitlines()):
            return answer.out, ""
        reasons.append(
            answer.why if answer.trouble else f"{command[0]} " + ("shows nothing" if answer.ok else answer.why)
        )
    return None, "the kernel's log cannot be read: " + "; ".join(reasons)


def _kmsg(node: Node) -> str:
    """The kernel's own buffer: a record a read, "priority,number,microseconds,flags;text"."""
    descriptor = os.open(node.path("dev/kmsg"), os.O_RDONLY | os.O_NONBLOCK)
    records: list[bytes] = []
    try:
        while len(records) < 1_000_000:
            try:
                record = os.read(descriptor, 65536)
            except BrokenPipeError:  # overwritten meanwhile; the next read goes on behind the gap
                continue
            except BlockingIOError:
                break
            if not record:
                break
            records.append(record)
    finally:
        os.close(descriptor)
    lines = []
    for line in b"".join(records).decode(errors="replace").splitlines():
        head, semicolon, said = line.partition(";")
        fields = head.split(",")
        if semicolon and len(fields) >= 3 and fields[2].isdigit():
            lines.append(f"[{int(fields[2]) / 1e6:.6f}] {said}")
    return "\n".join(lines)


CHECKS = (
    Check(
        "kernel_log",
        "recent errors of GPUs, memory, links and disks in the kernel's log (/dev/kmsg, dmesg)",
        kernel_log,
    ),
)
