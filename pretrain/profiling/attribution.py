"""Who spent the time: a profiler's events -> self time by phase of the step, by module, and waits for other ranks.

Events of one thread lie within each other like brackets, so that every moment of it belongs to the innermost one; its time
is given to

- a phase: the innermost of the ranges that the training loop names (parallel/ranges.py), or "collectives" where the thread
  runs, or waits within, a communication range of torch, or stands still in Python while a collective is under way;
- a module: the innermost module's range; within the backward pass that of the module which made the autograd node in the
  forward pass (nodes carry the number of the operation that made them). A module's range within the backward pass is its
  forward pass computed again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from parallel.ranges import PREFIX

MODULE = PREFIX + "module "
NODE = "autograd::engine::evaluate_function: "
COLLECTIVE = ("c10d::", "gloo:", "nccl:", "FSDP::all_gather", "FSDP::post_backward_r", "record_param_comms")
UNDER_WAY = ("gloo:", "nccl:")  # these last until a collective is done, on whatever thread
PHASES = ("data", "forward", "backward", "collectives", "optimizer", "checkpoint", "validation", "log", "other")
PASSES = ("forward", "recomputed", "backward")


class Event(NamedTuple):
    """One event of a profiler. Times in seconds; sequence: the autograd number, -1 for none."""

    name: str
    start: float
    end: float
    thread: int
    sequence: int = -1
    operation: bool = True
    """False for ranges that only name something: time in them and in nothing else is spent in Python, or waiting."""


@dataclass
class Spent:
    """Seconds of self time. modules: {name of the module, "" outside of all: {pass: seconds}}."""

    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    modules: dict[str, dict[str, float]] = field(
        default_factory=lambda: defaultdict(lambda: dict.fromkeys(PASSES, 0.0))
    )
    operations: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    steps: int = 0
    seconds: float = 0.0


class _Open(NamedTuple):
    event: Event
    phase: str
    module: str
    way: str


def attribute(events: Iterable[Event], main: int) -> Spent:
    """Self time of thread `main` from its first to its last named range, and of autograd's own threads by module."""
    ordered = sorted(events, key=lambda event: (event.start, -event.end))
    own = [event for event in ordered if event.thread == main]
    named = [event for event in own if event.name.startswith(PREFIX) and not event.name.startswith(MODULE)]
    spent = Spent()
    if not named:
        return spent
    begin, end = named[0].start, max(event.end for event in named)
    spent.steps = sum(event.name == PREFIX + "data" for event in named)
    spent.seconds = end - begin
    makers = _makers(ordered)
    busy = Intervals((event.start, event.end) for event in ordered if event.name.startswith(UNDER_WAY))
    threads = {event.thread for event in ordered if event.name.startswith(NODE)} - {main}
    whole = Event("whole", begin, end, main, operation=False)
    _walk(whole, [event for event in own if event.start >= begin and event.end <= end], makers, busy, spent, True)
    for thread in threads:  # a GPU's backward pass runs beside the main thread, which waits for it
        nodes = [event for event in ordered if event.thread == thread and event.start >= begin and event.end <= end]
        _walk(Event("whole", begin, end, thread, operation=False), nodes, makers, busy, spent, False)
    return spent


def _makers(ordered: Sequence[Event]) -> dict[int, str]:
    """Autograd's number -> the module whose forward pass used it."""
    found: dict[int, str] = {}
    stacks: dict[int, list[Event]] = defaultdict(list)
    for event in ordered:
        stack = stacks[event.thread]
        while stack and stack[-1].end <= event.start:
            stack.pop()
        if event.name.startswith(MODULE):
            stack.append(event)
        elif event.sequence >= 0 and stack and not event.name.startswith(NODE) and event.sequence not in found:
            found[event.sequence] = stack[-1].name.removeprefix(MODULE)
    return found


def _walk(
    whole: Event, events: Sequence[Event], makers: dict[int, str], busy: Intervals, spent: Spent, phases: bool
) -> None:
    stack = [_Open(whole, "other", "", "forward")]
    now = whole.start

    def until(time: float) -> None:
        """Gives the time from `now` to `time` to what is open."""
        nonlocal now
        if time <= now:
            return
        top = stack[-1]
        length = time - now
        waited = 0.0 if top.event.operation or top.phase == "collectives" else busy.within(now, time)
        if phases:
            spent.phases[top.phase] += length - waited
            spent.phases["collectives"] += waited
        if top.phase in ("forward", "backward") and (phases or top.way != "forward" or top.module):
            spent.modules[top.module][top.way] += length - waited
        if top.event.operation:
            spent.operations[top.event.name.removeprefix(NODE)] += length
        now = time

    for event in events:
        while stack[-1].event.end <= event.start and len(stack) > 1:
            until(stack[-1].event.end)
            stack.pop()
        until(event.start)
        stack.append(_opened(event, stack[-1], makers, phases))
    while stack:
        until(stack[-1].event.end)
        stack.pop()


def _opened(event: Event, under: _Open, makers: dict[int, str], main: bool) -> _Open:
    phase, module, way = under.phase, under.module, under.way
    name = event.name
    if name.startswith(MODULE):
        within = way in ("backward", "recomputed")
        return _Open(event, phase, name.removeprefix(MODULE), "recomputed" if within else "forward")
    if name.startswith(PREFIX):
        phase = name.removeprefix(PREFIX)
        phase = phase if phase in PHASES else under.phase
        return _Open(event, phase, "", "backward" if phase == "backward" else "forward")
    if name.startswith(NODE):
        return _Open(event, phase if main else "backward", makers.get(event.sequence, ""), "backward")
    if name.startswith(COLLECTIVE):
        phase = "collectives"
    return _Open(event, phase, module, way)


class Intervals:
    """A set of times, made of pieces that may overlap."""

    def __init__(self, pieces: Iterable[tuple[float, float]]):
        self.starts: list[float] = []
        self.ends: list[float] = []
        for start, end in sorted(pieces):
            if self.ends and start <= self.ends[-1]:
                self.ends[-1] = max(self.ends[-1], end)
            else:
                self.starts.append(start)
                self.ends.append(end)

    def within(self, start: float, end: float) -> float:
        """How much of [start, end] is in the set."""
        total = 0.0
        place = max(0, bisect_right(self.starts, start) - 1)
        while place < len(self.starts) and self.starts[place] < end:
            total += max(0.0, min(end, self.ends[place]) - max(start, self.starts[place]))
            place += 1
        return total
