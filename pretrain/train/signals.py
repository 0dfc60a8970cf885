"""SIGTERM and SIGUSR1 (what Slurm sends before it takes the nodes): finish the step, save, leave with exit code 75."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from pretrain.exit import PREEMPTED

WATCHED = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """Raised where there is no state to save; carries the exit code."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


class Signals:
    """Notes the first signal. Until `armed` (nothing trained yet) and at the second signal it leaves at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.armed = False

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._note) for number in WATCHED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None or not self.armed:
            raise Preempted
        self.received = signal.Signals(number).name
