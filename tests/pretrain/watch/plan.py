"""Things that happen to a training process in certain places; and, for real launchers, the command that makes them happen:

    torchrun ... tests/pretrain/watch/plan.py FOLDER PHASE:STEP:RANK:DO ... -- ARGUMENTS OF pretrain/main.py

Light: it must not import what the command itself imports after its fork only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

HOURS = 3600


@dataclass(frozen=True)
class At:
    """What happens to a rank when it begins a phase. step: None for any; count: how many beats fit before it happens; first:
    what `watchdog.first` is from then on, for a test whose earlier phases must not run into it.

    do: "hold" (sleep until released), "sleep" (for good), "gil" (wait for good in C, with Python's lock), "regex" (compute for
    good, with the lock), "stop" (SIGSTOP), "kill" (SIGKILL), "suspend" (SIGSTOP for the watcher as well), "error", "fail" (hold,
    then an error), "skip" (leave out the next all-reduce), "nothing".
    """

    phase: str
    step: int | None = None
    rank: int | None = None
    do: str = "hold"
    count: int = 0
    first: float | None = None


def run(arguments: list[str], plan: Sequence[At], folder: Path, rank: int, repeat: float) -> NoReturn:
    """The training command, with things happening to this rank. Ends with SystemExit."""
    from pretrain import main
    from pretrain.train import heartbeat, signals
    from pretrain.watch import watcher

    watcher.REPEAT = signals.REPEAT = repeat
    _observe_watcher(folder, rank)
    counts = dict.fromkeys(plan, 0)

    def observe(phase: str, step: int | None) -> None:
        for at in plan:
            if at.phase == phase and at.step in (None, step) and at.rank in (None, rank):
                counts[at] += 1
                if counts[at] == at.count + 1:
                    if at.first is not None and heartbeat._pulse is not None:
                        heartbeat.tell(settings=heartbeat._pulse._told["settings"] | {"first": at.first})
                    (folder / f"at-{at.phase}-{at.step}-{rank}").touch()
                    _happen(at.do, folder)

    heartbeat.observer = observe
    sys.exit(main.main(arguments))


def _observe_watcher(folder: Path, rank: int) -> None:
    """Lets the watcher note every signal that it has acted upon; and where there is a file `asleep`, find that hours have passed
    since its last look. Then the file is called `awake`.
    """
    from pretrain.watch.watcher import Watcher

    leave_now, look = Watcher._leave_now, Watcher._look

    def noted(self: Watcher, number: signal.Signals) -> bool:
        leave = leave_now(self, number)
        with (folder / f"heard-{int(number)}-{rank}").open("a") as file:
            file.write(".")
        return leave

    def woken(self: Watcher) -> str:
        cause = look(self)  # takes notice of the newest beat, so that none comes in the hours
        if not cause and (folder / "asleep").exists():
            self.looked -= 2 * HOURS
            cause = look(self)
            (folder / "asleep").rename(folder / "awake")
        return cause

    Watcher._leave_now, Watcher._look = noted, woken  # type: ignore[method-assign]


def _happen(what: str, folder: Path) -> None:
    if what == "hold":
        while not (folder / "release").exists():
            time.sleep(0.02)
    elif what == "fail":
        _happen("hold", folder)
        _happen("error", folder)
    elif what == "sleep":
        time.sleep(HOURS)
    elif what == "gil":
        mutex = ctypes.create_string_buffer(
            128
        )  # zeros are an unlocked one; unlike a sleep, no signal ends the wait for it
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)
    elif what == "regex":
        import re

        re.match(r"(a+)+$", "a" * 64 + "b")
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "suspend":
        os.killpg(0, signal.SIGSTOP)
    elif what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "error":
        raise RuntimeError("an error made by a test")
    elif what == "skip":
        import torch.distributed as dist

        real = dist.all_reduce

        def skip(*arguments: Any, **options: Any) -> None:
            dist.all_reduce = real

        dist.all_reduce = skip
    else:
        assert what == "nothing", what


def main() -> None:
    """`python tests/pretrain/watch/plan.py FOLDER PHASE:STEP:RANK:DO... -- ARGUMENTS`: for real launchers."""
    from parallel.ending import end  # as the command itself ends

    folder, *rest = sys.argv[1:]
    border = rest.index("--")
    plan = []
    for word in rest[:border]:
        phase, step, rank, do = word.split(":")
        plan.append(At(phase, int(step) if step else None, int(rank) if rank else None, do))
    end(lambda: run(rest[border + 1 :], plan, Path(folder), int(os.environ.get("RANK", 0)), 3.0))


if __name__ == "__main__":
    main()
