"""Where a training process says what it is doing, for its watcher (pretrain/watch). Nobody may be listening."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pretrain.watch.pulse import Pulse

if TYPE_CHECKING:
    from pretrain.checkpoint.agreement import Agreement
    from pretrain.config import RunConfig

observer: Callable[[str, int | None], None] | None = None
"""Told of every beat. Nothing but tests sets it, to do something to a job in a certain place."""

_pulse: Pulse | None = None


def attach(pulse: Pulse) -> None:
    """From now on this process speaks to the watcher at the other end of `pulse`."""
    global _pulse
    _pulse = pulse


def watched() -> bool:
    """Whether a watcher has started this process."""
    return _pulse is not None


def phase(name: str, step: int | None = None) -> None:
    """A phase, or the next piece of one, begins: start, rendezvous, data, model, load, step, evaluation, save or end.

    From the main thread only, and on every rank alike: the number of calls says which rank is behind. step: the one that is
    being computed, evaluated or saved; as before when left out.
    """
    if _pulse is not None:
        _pulse.beat(name, step)
    if observer is not None:
        observer(name, step)


def keep(state: int) -> None:
    """What a signal must not lose from now on: see pretrain/watch/pulse.py."""
    if _pulse is not None:
        _pulse.keep(state)


def watch(config: RunConfig) -> None:
    """Where the run is and which limits it sets."""
    settings, timeout = config.watchdog.model_dump(), config.train.timeout
    tell(folder=str(config.run.absolute()), settings=settings, timeout=timeout)


def joined(agreement: Agreement) -> None:
    """Gives this start of the job a name, the same on all ranks, under which their watchers will find each other. Collective."""

    def name() -> str:
        return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"

    tell(attempt=agreement.decide("naming this start of the job", name))


def error(fault: BaseException) -> None:
    """What ends this process. Of several, the first counts."""
    if _pulse is not None:
        lines = str(fault).strip().splitlines() or [""]
        _pulse.fail((lines[0] if hasattr(fault, "exit_code") else f"{type(fault).__name__}: {lines[0]}")[:500])


def tell(**facts: Any) -> None:
    """Anything short that the watcher is to know."""
    if _pulse is not None:
        _pulse.tell(**facts)
