"""How far the clocks of two hosts are apart: a question there and back, the shortest of many (Cristian 1989).

Plain TCP: the answer must not wait for a GPU, a thread pool or a collective.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from launch.preflight.check import Result, failed, passed, warned

ASKED = 20
WARN, FAIL = (
    0.1,
    2.0,
)  # seconds; launch/blame.py tells causes from consequences by the times of failures on several hosts
CLOCK = struct.Struct("!d")


class Skew(NamedTuple):
    """offset: seconds that the other clock is ahead. error: half the time of the question's journey."""

    offset: float
    error: float


class Server:
    """On rank 0: waits for the others' connections, and asks each in turn."""

    def __init__(self, address: str = ""):
        self.socket = socket.create_server(("", 0))
        self.address = [address or socket.gethostname(), self.socket.getsockname()[1]]

    def ask(self, hosts: Mapping[int, str], limit: float) -> dict[str, Skew | str]:
        """By host: its skew, or why it is not known. hosts: by rank; this rank, 0, is left out."""
        found: dict[str, Skew | str] = {host: "did not connect" for rank, host in hosts.items() if rank}
        end = time.monotonic() + limit
        with self.socket:
            for _ in found:
                self.socket.settimeout(max(0.01, end - time.monotonic()))
                try:
                    other, _address = self.socket.accept()
                except OSError:
                    break
                with other, contextlib.suppress(OSError, struct.error):
                    other.settimeout(max(0.01, end - time.monotonic()))
                    rank = int(_read(other))
                    if rank in hosts:
                        found[hosts[rank]] = measure(other)
        return found


def measure(other: socket.socket, now: Callable[[], float] = time.time) -> Skew:
    """Raises OSError when the connection is lost."""
    other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    best = Skew(0.0, float("inf"))
    for _ in range(ASKED):
        sent = now()
        other.sendall(CLOCK.pack(sent))
        there = _read(other)
        back = now()
        if (back - sent) / 2 < best.error:
            best = Skew(there - (sent + back) / 2, (back - sent) / 2)
    return best


def answer(rank: int, address: Sequence[Any], limit: float, now: Callable[[], float] = time.time) -> None:
    """On the other leaders: tells its time as often as it is asked."""
    with contextlib.suppress(OSError), socket.create_connection((address[0], address[1]), timeout=limit) as one:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one.sendall(CLOCK.pack(float(rank)))
        for _ in range(ASKED):
            _read(one)
            one.sendall(CLOCK.pack(now()))


def _read(one: socket.socket) -> float:
    data = b""
    while len(data) < CLOCK.size:
        part = one.recv(CLOCK.size - len(data))
        if not part:
            raise ConnectionError("closed")
        data += part
    return float(CLOCK.unpack(data)[0])


def judge(found: Mapping[str, Skew | str]) -> list[Result]:
    """A line for each clock that is off, and one for those that are not. Only what is certain counts: offset less error."""
    results, well = [], []
    for host, each in found.items():
        if isinstance(each, str):
            results.append(failed(f"{each}: its clock could not be asked", host))
            continue
        text = f"{each.offset:+.4g} s against rank 0's host (within {each.error:.2g} s)"
        values = {"offset": each.offset, "error": each.error}
        certain = abs(each.offset) - each.error
        if certain >= FAIL:
            results.append(failed(f"{text}: what comes first cannot be told from times", host, **values))
        elif certain >= WARN:
            results.append(warned(f"{text}: start chrony or ntpd", host, **values))
        else:
            well.append((host, each))
    if well:
        most = max(abs(each.offset) for _, each in well)
        error = max(each.error for _, each in well)
        offsets = {host: each.offset for host, each in well}
        results.append(
            passed(f"{len(well)} host(s) within {most:.3g} s of rank 0's (known to {error:.2g} s)", offsets=offsets)
        )
    return results
