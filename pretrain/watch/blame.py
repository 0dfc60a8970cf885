"""Whose fault is a hang, as far as the reports of all ranks can tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pretrain.watch.process import STOPPED, UNKNOWN
from pretrain.watch.pulse import Beat

ENDED = "ended"


@dataclass(frozen=True)
class Report:
    """Where one rank is. count: its beats so far; every rank makes the same ones, so the lowest is behind.

    state: as in process.STATES. meets: whether it waits for other ranks. place: where in the program. note: more, or "".
    """

    rank: int
    host: str
    phase: str
    step: int
    count: int
    seconds: float
    limit: float
    state: str
    meets: bool
    place: str
    note: str = ""

    @property
    def position(self) -> str:
        return str(Beat(self.count, self.phase, self.step, 0))


def blame(reports: Sequence[Report], world: int) -> dict[int, str]:
    """Rank -> why it is thought to be at fault; {} when nothing tells one rank from another.

    What explains a hang by itself comes first: a rank that is not there, or stopped. Then one that does something else while the
    others wait for it. Then one that is behind: it waits in an operation that the others are done with, or never took part in.
    """
    silent = dict.fromkeys(set(range(world)) - {each.rank for each in reports}, "no word from it or its watcher")
    stopped = {each.rank: each.state for each in reports if each.state in STOPPED}
    if silent or stopped:
        return dict(sorted((silent | stopped).items()))
    waiting = [each for each in reports if each.meets]
    busy = {
        each.rank: f"not waiting for others as they are, but in {each.place}"
        for each in reports
        if not each.meets and each.place != UNKNOWN  # a rank that gave no stacks in time may wait like the others
    }
    if waiting and busy:
        return busy
    ahead = max(reports, key=lambda each: each.count)
    behind = {
        each.rank: f"behind, or the others left out an operation with it ({ahead.position})"
        for each in reports
        if each.count < ahead.count
    }
    return behind


def summary(reports: Sequence[Report], world: int, cause: str, where: str) -> str:
    """The lines that one watcher prints for all of them."""
    faults = blame(reports, world)
    lines = [f"HANG: {cause}"]
    of_rank = {each.rank: each for each in reports}
    for rank, reason in list(faults.items())[:16]:
        at = f" on {of_rank[rank].host}, {of_rank[rank].position}" if rank in of_rank else ""
        lines.append(f"  at fault: rank {rank}{at}: {reason}")
    if len(faults) > 16:
        lines.append(f"  at fault: {len(faults) - 16} ranks more")
    if not faults and world > 1:
        apart = len({each.place for each in reports}) > 1 and all(each.meets for each in reports)
        lines.append(
            "  ranks wait in different places: one of them left out an operation, or made them in another order"
            if apart
            else "  nothing tells which rank is at fault: all wait, or work, in the same phase and step"
        )

    def line(each: Report) -> str:
        # A wait in the same place is one line, however many ranks there are.
        doing = "wait for others in" if each.meets else f"{each.state}, in"
        return f"{each.position}, {doing} {each.place}" + (f"; {each.note}" if each.note else "")

    lines += [f"  rank {ranks}: {text}" for text, ranks in _grouped(reports, line)[:16]]
    return "\n".join([*lines, f"  stacks of all threads: {where}"])


def _grouped(reports: Sequence[Report], line: Callable[[Report], str]) -> list[tuple[str, str]]:
    groups: dict[str, list[int]] = {}
    for each in sorted(reports, key=lambda each: each.rank):
        groups.setdefault(line(each), []).append(each.rank)
    return [(text, spans(ranks)) for text, ranks in groups.items()]


def spans(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"; ranks in ascending order."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
