"""Which hosts fail again and again, from the journal alone: every supervisor that reads the same lines finds the same hosts."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from launch.journal import Record
from launch.outcome import RankEnd, first_failure

FILE = "excluded_hosts"
TEARDOWN = 600.0  # seconds after the end of a launch on one host in which it ends on the others, too


NEEDED = {"time", "started", "ranks", "at_fault"}  # a line that somebody has edited may lack them
NAMED = ("hang", "numerical")  # put down to certain ranks by the ranks themselves


class Suspect(NamedTuple):
    """The failure for which a host may be to blame: its ranks' first one, if it is of such a kind."""

    kind: str
    time: float


def suspect(record: Record) -> Suspect | None:
    """What the end of a launch on one host says against that host; None when that is nothing."""
    first = first_failure([RankEnd(**end) for end in record["ranks"]], record["at_fault"])
    kind = None if first is None else first.kind(record["at_fault"])
    return None if first is None or kind is None else Suspect(kind, first.time)


def guilty(records: Sequence[Record]) -> list[tuple[Record, str]]:
    """The ends of launches whose cause lay on that host, each with the kind of failure."""
    ends = sorted((r for r in records if r["event"] == "end" and r.keys() >= NEEDED), key=lambda record: record["time"])
    suspects = [suspect(record) for record in ends]
    times = [record["time"] for record in ends]
    found = []
    for record, own in zip(ends, suspects):
        if own is None:
            continue
        # The other hosts' ends of the same launch. Hosts meet before ranks start, so what ended earlier was another launch.
        near = range(bisect_left(times, record["started"]), bisect_right(times, record["time"] + TEARDOWN))
        beside = [i for i in near if ends[i]["host"] != record["host"] and ends[i]["started"] <= record["time"]]
        others = [other for i in beside if (other := suspects[i]) is not None]
        if own.kind in NAMED:
            alike = sum(other.kind == own.kind for other in others)
            cause = not beside or alike < len(beside)  # of all hosts alike, none stands out
        else:
            cause = all(own.time < other.time for other in others)  # the others' came of it
        if cause:
            found.append((record, own.kind))
    return found


def excluded(records: Sequence[Record], after: int) -> dict[str, str]:
    """The hosts that began the end of `after` launches (0: no number is too many), each with the reason in words.

    Once is enough for a numerical fault: the ranks have computed the step again, or gone back and met it again.
    """
    pardons = {record["host"]: record["time"] for record in records if record["event"] == "readmit"}
    kinds: dict[str, list[str]] = {}
    for record, kind in guilty(records):
        if record["time"] > pardons.get(record["host"], 0.0):
            kinds.setdefault(record["host"], []).append(kind)
    return {
        host: f"first to fail {len(found)} time(s) ({', '.join(found)})"
        for host, found in kinds.items()
        if after and (len(found) >= after or "numerical" in found)
    }


def write_file(run: Path, hosts: dict[str, str]) -> None:
    """`<run>/excluded_hosts`, a host a line; removed when there is none. Read by launch/slurm.sh."""
    path = run / FILE
    try:
        if not hosts:
            path.unlink(missing_ok=True)
            return
        temporary = path.with_name(f".{FILE}.{os.getpid()}")
        temporary.write_text("".join(f"{host}\n" for host in sorted(hosts)), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        print(f"supervise: {path}: {error.strerror}", flush=True)
