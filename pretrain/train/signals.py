"""SIGTERM and SIGUSR1 (what Slurm sends before it takes the nodes): finish the step, save, leave with exit code 75.

What the training process does about them. With a watcher (pretrain/watch) it is the watcher that gets the signal, passes it on
where there is state to save, and ends this process where there is none or where a second signal is in a hurry. Without one, as
in a script that calls `train`, this is all there is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from types import FrameType, TracebackType

from pretrain.exit import PREEMPTED
from pretrain.train import heartbeat
from pretrain.train.callback import Callback, Run
from pretrain.watch.pulse import EVERYWHERE, OWN
from pretrain.watch.watcher import ASKED, REPEAT


class Preempted(SystemExit):
    """Raised where there is no state to save; carries the exit code."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


class Signals:
    """Notes the first signal. Until `armed` (no step made yet) it leaves at once; later, a signal that comes again after
    REPEAT seconds does. Sooner it is the same request: a scheduler may signal the launcher, which passes it on, and us.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.armed = False
        self.since = 0.0

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._note) for number in ASKED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.armed or (self.received is not None and time.monotonic() - self.since > REPEAT):
            if heartbeat.watched():
                # Unwinding would take leave of the other ranks, which may not be listening.
                with contextlib.suppress(RuntimeError):  # the signal has interrupted a print
                    sys.stdout.flush()
                os._exit(PREEMPTED)
            raise Preempted
        if self.received is not None:
            return
        self.since = time.monotonic()
        self.received = signal.Signals(number).name

    @property
    def flag(self) -> bool:
        return self.received is not None


class Arm(Callback):
    """The first of the callbacks: as soon as this process has made a step, there is state to save.

    What was loaded lies in a checkpoint already: a signal in the first step, which may compile for half an hour, loses nothing.
    """

    def __init__(self, signals: Signals) -> None:
        self.signals = signals

    def on_step(self, run: Run) -> None:
        # In the second step all ranks have met after their first one, so none of them leaves at once any more.
        heartbeat.keep(EVERYWHERE if self.signals.armed else OWN)
        self.signals.armed = True
