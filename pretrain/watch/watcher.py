"""One rank's watcher: a loop that waits for a signal, the end of the training process, or the end of its patience."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

from pretrain.exit import ERROR, HANG, PREEMPTED
from pretrain.watch import outcome, process, report
from pretrain.watch.blame import ENDED, Report
from pretrain.watch.limits import Limits
from pretrain.watch.process import Stacks
from pretrain.watch.pulse import NOTHING, OWN, Pulse

ASKED = (signal.SIGTERM, signal.SIGUSR1)
SIGNALS = (*ASKED, signal.SIGINT, signal.SIGCHLD)
POLL = 0.2  # seconds
MARK = 1.0  # seconds without a beat, and between two looks, before the run folder is asked whether another rank hangs
GRACE = 0.5  # seconds for the training process to leave by itself
# Schedulers signal the launcher, which passes it on, and all processes of the job as well: what comes within this time is one
# request. A person who presses twice, and Slurm's second round, take longer.
REPEAT = 3.0
FROM_KERNEL = 0x80  # SI_KERNEL: a terminal's signal, which the training process has got as well


class Watcher:
    """Watches process `child`. `run` returns the exit code of this rank, or does not return where a signal ended the child."""

    def __init__(self, child: int, pulse: Pulse, stacks: Stacks) -> None:
        self.child, self.pulse, self.stacks = child, pulse, stacks
        self.me = outcome.of_rank()
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.limits = Limits()
        self.asked: signal.Signals | None = None
        self.since = 0.0
        self.interrupted = 0.0
        self.looked = time.monotonic()
        self.marked = 0.0  # when the run folder was last asked
        self.asking: threading.Thread | None = None  # it
        self.called = threading.Event()  # by another rank's watcher
        self.cleared = False

    def run(self) -> int:
        while True:
            found = signal.sigtimedwait(SIGNALS, POLL)
            # Before a look at the child: a signal that came just before its end may be why it ended.
            at_once = found is not None and found.si_signo in ASKED and self._leave_now(signal.Signals(found.si_signo))
            ended = self._ended()
            if ended is not None:
                return self._after(ended)
            if at_once:
                return self._preempted()
            if found is not None and found.si_signo == signal.SIGINT and found.si_code != FROM_KERNEL:
                self.interrupted = time.monotonic()
            if self.interrupted and time.monotonic() - self.interrupted > GRACE:
                # Not at once: a launcher that signals the whole group has reached the training process already.
                self.interrupted = 0.0
                os.kill(self.child, signal.SIGINT)
            cause = self._look()
            if cause:
                return self._hang(cause)

    # ------------------------------------------------------------------------------------------------------- signals

    def _leave_now(self, number: signal.Signals) -> bool:
        """Whether this signal ends the job at once; else the training process has been told, and will save."""
        first = self.asked is None
        if self.asked is None:
            self.asked, self.since = number, time.monotonic()
        if self.pulse.read().state == NOTHING:
            return True
        if first:
            os.kill(self.child, number)
        return not first and time.monotonic() - self.since > REPEAT

    def _preempted(self) -> int:
        assert self.asked is not None
        os.kill(self.child, self.asked)  # it may still print what it has to say
        self._end_child(GRACE)
        beat = self.pulse.read()
        lost = "before there was anything to save" if beat.state == NOTHING else "without waiting for a save"
        return self._finish(f"stopped by {self.asked.name} in {beat}, {lost}", PREEMPTED, speak=True)

    # --------------------------------------------------------------------------------------- the training process's end

    def _ended(self) -> int | None:
        """The exit code of the child, minus the signal that ended it; None while it runs."""
        pid, status = os.waitpid(self.child, os.WNOHANG)
        return None if pid == 0 else os.waitstatus_to_exitcode(status)

    def _after(self, code: int) -> int:
        beat, failed = self.pulse.last(), code in (ERROR, -signal.SIGABRT)
        if failed and self.asked and beat.state == OWN:
            # Ranks that had nothing to save yet have left at once, which others then met as an error.
            return self._finish(f"stopped by {self.asked.name} in {beat}", PREEMPTED)
        if failed and self._gave_up():
            return self._hang(f"an operation of all ranks ran out of time in {beat}", code)
        if code == 0:
            return 0
        if code < 0:
            text = f"the training process was ended by {signal.Signals(-code).name} in {beat}"
            self._finish(text, code, speak=code != -signal.SIGINT, every_rank=True)
            outcome.die(-code)
            return 128 - code  # not reached but for signals that end nobody
        if code == PREEMPTED:
            return self._finish(f"preempted in {beat}", code)
        return self._finish(self.pulse.facts().get("error") or f"exit code {code} in {beat}", code)

    def _gave_up(self) -> bool:
        """Whether the child ended because it had waited for others as long as its process group would (`train.timeout`)."""
        facts = self.pulse.facts()
        settings, text = facts.get("settings", {}), str(facts.get("error", "")).lower()
        if not settings.get("enabled") or facts.get("waited", self.limits.seconds) < 0.9 * facts["timeout"]:
            return False
        # An abort is what NCCL's own watchdog makes of it. Another rank's may have come first, and closed our connection.
        own = not text or "timed out" in text or "timeout" in text
        for _ in range(0 if own else 10):
            if self._mark():
                return True
            time.sleep(POLL)
        return own

    def _finish(self, text: str, code: int, *, speak: bool = False, every_rank: bool = False) -> int:
        rank = self.me["rank"]
        if speak and (rank == 0 or every_rank):
            print(f"rank {rank}: {text}" if every_rank and self.world > 1 else text, file=sys.stderr, flush=True)
        outcome.record(text, code, self.pulse.last())
        return code

    def _end_child(self, grace: float = 0.0) -> None:
        deadline = time.monotonic() + grace
        try:
            while grace and time.monotonic() < deadline:
                if self._ended() is not None:
                    return
                time.sleep(0.02)
            os.kill(self.child, signal.SIGKILL)
            deadline = (
                time.monotonic() + 5.0
            )  # in the kernel, uninterruptible, it would not die; we do not wait for that
            while self._ended() is None and time.monotonic() < deadline:
                time.sleep(0.02)
        except (ChildProcessError, ProcessLookupError):
            return

    # --------------------------------------------------------------------------------------------------------- hangs

    def _look(self) -> str:
        """The cause, if there is a hang, here or on another rank; else ""."""
        now = time.monotonic()
        self.limits.look(self.pulse.read(), now - self.looked)
        self.looked = now
        facts = self.pulse.facts()
        settings = facts.get("settings", {})
        if not settings.get("enabled", True):
            return ""
        if not self.cleared and "folder" in facts and "attempt" not in facts:
            # Until the ranks have met they have no name in common that is new; what bears this one is of an earlier start.
            report.within(MARK, partial(shutil.rmtree, self._folder(), ignore_errors=True))
            self.cleared = True
        limit, beat = self.limits.limit(settings), self.pulse.read()
        if self.limits.seconds > limit:
            return (
                f"{beat}: no progress for {self.limits.seconds:.3g} s on rank {self.me['rank']} (limit {limit:.3g} s)"
            )
        if self.limits.seconds > MARK and now - self.marked > MARK:
            self.marked = now
            if self._mark():
                return f"{beat}: called by another rank's watcher"
        return ""

    def _folder(self) -> Path:
        facts = self.pulse.facts()
        names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID")
        job = hashlib.sha256(repr([os.environ.get(name) for name in names]).encode()).hexdigest()[:8]
        return Path(facts["folder"]) / report.FOLDER / str(facts.get("attempt", f"rendezvous-{job}"))

    def _mark(self) -> bool:
        """Whether another rank's watcher has called a hang in this attempt."""
        if "attempt" not in self.pulse.facts():
            return False
        # A file system that does not answer holds one thread, not one for each look; a late answer is taken with the next.
        if self.asking is None or not self.asking.is_alive():
            self.asking = threading.Thread(target=self._ask_folder, args=(self._folder(),), daemon=True)
            self.asking.start()
        self.asking.join(MARK)
        return self.called.is_set()

    def _ask_folder(self, folder: Path) -> None:
        with contextlib.suppress(OSError):
            if folder.is_dir():
                self.called.set()

    def _hang(self, cause: str, code: int | None = None) -> int:
        """Reports, ends the child, returns 76. code: the child's, where it has ended already."""
        beat, facts = self.pulse.last(), self.pulse.facts()
        settings = facts.get("settings", {})
        state = process.state(self.child) if code is None else ENDED
        text = self.stacks.ask(self.child, facts.get("thread", 0)) if state not in (ENDED, *process.STOPPED) else ""
        stack = process.frames(text, facts.get("thread", 0))
        notes = [] if code is None else [str(facts.get("error") or f"exit code {code}")]
        if not text and code is None:
            notes.append("a stopped process cannot tell its stacks" if state in process.STOPPED else "no answer")
        mine = Report(
            self.me["rank"], self.me["host"], beat.phase, beat.step, beat.count, round(self.limits.seconds, 1),
            self.limits.limit(settings), state, code is not None or process.meets(stack), process.place(stack),
            "; ".join(notes).replace("\n", " "),
        )  # fmt: skip
        body = "\n".join([*process.kernel(self.child), text]) if code is None else ""
        gather = float(settings.get("gather", 10.0))
        said = None
        if "folder" in facts:
            folder = self._folder()
            shared = partial(report.share, folder.parents[1], folder.name, mine, body, self.world, cause, gather)
            said = report.within(gather + 5.0, shared)
        if said is None:  # no folder yet, or none that answers
            said = f"HANG: {cause}\n  rank {mine.rank}: {mine.position}, {mine.state}, {mine.place}\n{body}"
        if said:
            print(said, file=sys.stderr, flush=True)
        if code is None:
            self._end_child()
        return self._finish(f"hang: {cause}", HANG)
