"""SIGTERM and SIGUSR1 (what Slurm sends before it takes the nodes): finish the step, save, leave with exit code 75."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

from pretrain.exit import PREEMPTED

PATIENCE = 10.0  # seconds
WATCHED = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """Raised where there is no state to save; carries the exit code."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


class Signals:
    """Notes the first signal. Until `armed` (nothing trained yet) it leaves at once; later, a signal that comes again after
    PATIENCE seconds does. Sooner it is the same request: a scheduler may signal the launcher, which passes it on, and us.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.armed = False
        self.since = 0.0

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._note) for number in WATCHED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.armed or (self.received is not None and time.monotonic() - self.since > PATIENCE):
            raise Preempted
        if self.received is not None:
            return
        self.since = time.monotonic()
        self.received = signal.Signals(number).name
