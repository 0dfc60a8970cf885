"""How long a phase may take, learned from how long it took before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.watch.pulse import Beat

# Until the training process has read its configuration.
FIRST = 3600.0
SAVED = ("save", "end")
ONCE = ("start", "rendezvous", "data", "model", "load")
BLINK = 1.0  # seconds; a watcher that was away for longer does not know whether the training process was, too


class Limits:
    """Counts the seconds since the last beat, and knows how many are too many.

    The seconds are those that the watcher has been there: a job that was suspended (Ctrl-Z, a paused virtual machine) or that
    the machine has not let run for a while has not hung. Which ends a wait for a rank that never comes: where the limit lies
    below `train.timeout` (a step that took 10 s before: 180 s) this one does, and all ranks can still be asked where they are.
    Where it lies above (the first step, rendezvous, steps of minutes), the process group gives up first; its error is then
    taken for the hang that it is (watcher.py), with the same report and exit code.
    """

    def __init__(self) -> None:
        self.longest: dict[str, float] = {}
        self.beat: Beat | None = None
        self.seconds = 0.0

    def look(self, beat: Beat, passed: float) -> None:
        """beat: the newest. passed: seconds since the last look."""
        passed = min(passed, BLINK)
        if self.beat is None or beat.count == self.beat.count:
            self.seconds += passed
        else:
            phase = self.beat.phase
            self.longest[phase] = max(self.longest.get(phase, 0.0), self.seconds)
            self.seconds = 0.0
        self.beat = beat

    def limit(self, settings: Mapping[str, Any]) -> float:
        """Seconds that the present phase may take, with the settings of WatchdogConfig, or none yet."""
        assert self.beat is not None, "look first"
        phase = self.beat.phase
        if not settings:
            return FIRST
        if phase in ONCE or (phase not in self.longest and phase != "end"):
            return float(settings["first"])
        floor = settings["save_floor"] if phase in SAVED else settings["floor"]
        return float(max(floor, settings["factor"] * self.longest.get(phase, 0.0)))
