"""Whether the clock is kept right: hosts of a job compare times, of failures and of saves."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import NamedTuple

from launch.preflight.check import Check, Result, failed, not_checked, passed, warned
from launch.preflight.node import Node

UNSYNCHRONISED = 0x0040  # STA_UNSYNC of adjtimex(2)
SENSIBLE = 1_735_689_600  # 2025: a clock before that has lost its battery


class Kernel(NamedTuple):
    """What the kernel knows of its clock. error: seconds that it may be off."""

    synchronised: bool
    error: float


class _Timex(ctypes.Structure):
    _fields_ = (
        ("modes", ctypes.c_uint), ("offset", ctypes.c_long), ("freq", ctypes.c_long), ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long), ("status", ctypes.c_int), ("rest", ctypes.c_byte * 512),
    )  # fmt: skip


def kernel() -> Kernel | None:
    """adjtimex(2), read only; None where there is none. Any user may ask, also inside a container."""
    try:
        given = _Timex()
        state = ctypes.CDLL(None).adjtimex(ctypes.byref(given))
    except (AttributeError, OSError):
        return None
    if state < 0:
        return None
    return Kernel(not given.status & UNSYNCHRONISED, given.maxerror / 1e6)


def clock(node: Node, ask: Callable[[], Kernel | None] = kernel, now: Callable[[], float] = time.time) -> list[Result]:
    if now() < SENSIBLE:
        return [failed(f"it is set to {time.strftime('%Y-%m-%d', time.gmtime(now()))}: certificates and leases fail")]
    found = ask()
    service = node.run("timedatectl", "show", "--property", "NTPSynchronized", "--value")
    said = {"yes": True, "no": False}.get(service.out.strip()) if service.ok else None
    if said or (found is not None and found.synchronised):
        by = "the kernel's flag" if found is not None and found.synchronised else "timedatectl"
        text = f"synchronised, by {by}" + (
            f"; off by {found.error:.3g} s at most" if found and found.synchronised else ""
        )
        return [passed(text, error=None if found is None else found.error)]
    if said is None and found is None:
        return [not_checked(f"neither the kernel nor timedatectl tells ({service.why})")]
    why = (
        "times of failures and saves cannot be compared between hosts: start chrony or ntpd (--peers measures the skew)"
    )
    return [warned(f"not synchronised, by {'the kernel' if found else 'timedatectl'}: {why}")]


CHECKS = (Check("clock", "whether the clock is synchronised (adjtimex, timedatectl)", clock),)
