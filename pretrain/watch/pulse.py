"""What a training process tells its watcher: a piece of memory that both see.

The training process stores, the watcher reads; neither waits for the other, so that nothing that stops the training process
(a lock, a full pipe, Python's own lock) can stop the watcher.
"""

from __future__ import annotations

import json
import mmap
import struct
import time
from dataclasses import dataclass, replace
from typing import Any

PHASES = ("start", "rendezvous", "data", "model", "load", "step", "evaluation", "save", "end")

# How much of the training a signal must not lose.
NOTHING, OWN, EVERYWHERE = range(3)
"""Nothing yet; this rank has made a step of its own; and every rank is known to have made one."""

_COUNT = struct.Struct("<Q")
_BEAT = struct.Struct("<qqq")  # phase, step, state
_FACTS = 64  # where they begin: version, length, JSON
_SIZE = 16384


@dataclass(frozen=True)
class Beat:
    """count: beats so far, in the same order on every rank, so it says who is behind. step: -1 before there are steps."""

    count: int
    phase: str
    step: int
    state: int

    def __str__(self) -> str:
        return f"phase {self.phase}" + (f", step {self.step}" if self.step >= 0 else "")


class Pulse:
    """Made before the fork. `beat`, `keep` and `tell` are for the training process, `read` and `facts` for the watcher."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, _SIZE)  # shared between processes, and without a file
        self._count = 0
        self._since = time.monotonic()
        self._now = (0, -1, NOTHING)
        _BEAT.pack_into(self._page, _COUNT.size, *self._now)
        self._told: dict[str, Any] = {}
        self._versions = 0
        self._heard: tuple[int, dict[str, Any]] = (0, {})

    def beat(self, phase: str, step: int | None = None) -> None:
        """Something has begun that ends soon, or is over its limit. Costs about a microsecond."""
        self._count += 1
        self._since = time.monotonic()
        assert phase in PHASES, phase
        self._now = (PHASES.index(phase), self._now[1] if step is None else step, self._now[2])
        _BEAT.pack_into(self._page, _COUNT.size, *self._now)
        _COUNT.pack_into(self._page, 0, self._count)

    def keep(self, state: int) -> None:
        """What a signal must not lose from now on: NOTHING, OWN or EVERYWHERE."""
        self._now = (*self._now[:2], state)
        _BEAT.pack_into(self._page, _COUNT.size, *self._now)

    def fail(self, error: str) -> None:
        """What ends the process: told once, with the place, for on the way out other phases begin."""
        if "error" not in self._told:
            phase, step, _ = self._now
            self.tell(error=error, phase=PHASES[phase], step=step, waited=time.monotonic() - self._since)

    def tell(self, **facts: Any) -> None:
        """Adds to what the watcher knows: anything that JSON can hold and that is short."""
        self._told |= facts
        text = json.dumps(self._told).encode()
        assert len(text) <= _SIZE - _FACTS - 2 * _COUNT.size, "facts are meant to be short"
        self._versions += 1
        begin = _FACTS + 2 * _COUNT.size
        self._page[begin : begin + len(text)] = text
        _COUNT.pack_into(self._page, _FACTS + _COUNT.size, len(text))
        _COUNT.pack_into(self._page, _FACTS, self._versions)

    def read(self) -> Beat:
        """The newest beat. One that is just being written may come out mixed; the next reading is right."""
        phase, step, state = _BEAT.unpack_from(self._page, _COUNT.size)
        return Beat(_COUNT.unpack_from(self._page, 0)[0], PHASES[phase], step, state)

    def last(self) -> Beat:
        """The newest beat, or the one at which an error struck."""
        beat, facts = self.read(), self.facts()
        return replace(beat, phase=facts["phase"], step=facts["step"]) if "error" in facts else beat

    def facts(self) -> dict[str, Any]:
        """All that was told so far."""
        version = _COUNT.unpack_from(self._page, _FACTS)[0]
        if version != self._heard[0]:
            length = _COUNT.unpack_from(self._page, _FACTS + _COUNT.size)[0]
            begin = _FACTS + 2 * _COUNT.size
            try:
                self._heard = (version, json.loads(self._page[begin : begin + length]))
            except ValueError:  # it is being written at this moment
                return self._heard[1]
        return self._heard[1]
