"""How the ranks of this host ended: what torchrun saw of them, and what they wrote about themselves."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pretrain import exit as codes

# Codes by which a rank speaks for the whole job. Any other code beside one of these is in its wake.
OWN_TERMS = (codes.USAGE, codes.HANG, codes.BAD_DATA, codes.NO_CHECKPOINT, codes.NUMERICAL)

# What drivers and libraries say when the device, its memory or the way to it is broken. Out of memory is not.
DEVICE_FAULT = re.compile(
    r"uncorrectable ECC|ECC error|device-side assert|an illegal memory access|unspecified launch failure|hardware exception"
    r"|(CUDA|HIP) error: (?!out of memory)|GPU is lost|fallen off the bus|hipErrorLaunchFailure|cudaErrorDevicesUnavailable",
    re.IGNORECASE,
)

SUMMARY_WAIT = 3.0  # seconds
REPORT = "torchrun.json"  # what launch/elastic.py leaves in the log folder


class RankEnd(NamedTuple):
    """The end of one rank. code: as its parent saw it, -9 after a kill -9. time: unix seconds, whole ones."""

    rank: int
    local_rank: int
    code: int
    time: float
    phase: str | None = None
    step: int | None = None
    message: str = ""

    def kind(self, at_fault: Collection[int]) -> str | None:
        """Why the host may be to blame: killed, device, hang or numerical; None when it is not.

        at_fault: the ranks that a hang or a numerical fault is put down to; of these, all ranks end with the same code.
        """
        if self.code in (-signal.SIGKILL, -signal.SIGBUS):
            return "killed"
        if self.code in (codes.HANG, codes.NUMERICAL):
            return ("hang" if self.code == codes.HANG else "numerical") if self.rank in at_fault else None
        return "device" if DEVICE_FAULT.search(self.message) else None


class Outcome(NamedTuple):
    """How one torchrun ended on this host. ranks: those that did not end with 0. processes: how many were started."""

    ranks: tuple[RankEnd, ...]
    launcher: int  # torchrun's own exit code, negative for a signal
    processes: int
    at_fault: tuple[int, ...] = ()  # ranks, on any host, that a hang or a numerical fault is put down to
    trouble: str = ""  # torchrun's, when no rank was at fault: most often, the hosts did not meet

    @property
    def code(self) -> int:
        """The one exit code for it all: of the rank that speaks for the job, or else of the first to fail."""
        spoken = [end for end in self.ranks if end.code in OWN_TERMS]
        if spoken:
            return min(spoken, key=lambda end: end.time).code
        if self.ranks and all(end.code == codes.PREEMPTED for end in self.ranks):
            return codes.PREEMPTED
        # torchrun ends the others with SIGTERM, on which they leave with 75: that is no preemption.
        causes = [end for end in self.ranks if end.code not in (codes.PREEMPTED, -signal.SIGTERM)] or list(self.ranks)
        if causes:
            return positive(min(causes, key=lambda end: end.time).code)
        return positive(self.launcher)

    def text(self) -> str:
        """One line about the first rank to fail, or about torchrun."""
        chosen = [end for end in self.ranks if positive(end.code) == self.code]
        if chosen:
            first = min(chosen, key=lambda end: end.time)
            return words_for(first._asdict()) + (f": {first.message}" if first.message else "")
        return self.trouble or f"torchrun ended with {_code(self.launcher)}"


def positive(code: int) -> int:
    """A shell's exit code: 137 for -9."""
    return 128 - code if code < 0 else code


def words_for(end: Mapping[str, Any]) -> str:
    """`rank 3: 76 in step 41`."""
    where = "" if not end.get("phase") else f" in {end['phase']}"
    step = (
        "" if end.get("step") is None else f" {end['step']}" if end.get("phase") == "step" else f", step {end['step']}"
    )
    return f"rank {end['rank']}: {_code(end['code'])}{where}{step}"


def _code(code: int) -> str:
    if code >= 0:
        return str(code)
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def first_failure(ranks: Sequence[RankEnd], at_fault: Collection[int]) -> RankEnd | None:
    """The rank that failed first. Times are whole seconds: of those in one second, the one whose host may be to blame.

    torchrun kills what does not leave on SIGTERM, but only after half a minute: no such kill comes first.
    """
    return min(ranks, key=lambda end: (int(end.time), end.kind(at_fault) is None, end.rank), default=None)


def read(folder: Path, launcher: int, run: Path, started: float) -> Outcome:
    """From the log folder of a torchrun that was started at `started` (unix seconds) and has ended with the code `launcher`.

    torchrun's report has the ranks that failed and their codes; each rank's error file (error.json, written by the rank's
    parent process) adds the phase and the step, and the code that the rank meant.
    """
    report = _load(folder / REPORT)
    written: dict[int, RankEnd] = {}
    for file in sorted(folder.glob("*/attempt_*/*/error.json")):
        end = _rank_end(_load(file), int(file.parent.name) if file.parent.name.isdigit() else 0)
        if end is not None:
            written[end.rank] = end
    seen: dict[int, RankEnd] = {}
    for failure in report.get("failures", ()):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            end = RankEnd(
                int(failure["rank"]), int(failure["local_rank"]), int(failure["code"]), float(failure["time"])
            )
            seen[end.rank] = end
    # A rank that wrote and is not among the failures had not ended when torchrun was killed, or was replaced in time.
    ranks = {rank: _joined(end, written.get(rank)) for rank, end in (seen or (written if launcher else {})).items()}
    ends = tuple(ranks[rank] for rank in sorted(ranks))
    return Outcome(ends, launcher, begun(folder), at_fault(ends, run, started), str(report.get("trouble", "")))


def begun(folder: Path) -> int:
    """The number of ranks that torchrun has started, by its log folder."""
    return len([place for place in folder.glob("*/attempt_*/*") if place.is_dir()])


def at_fault(ends: Sequence[RankEnd], run: Path, started: float) -> tuple[int, ...]:
    """The ranks that a numerical fault (pretrain/train/faults) or a hang (pretrain/watch) of this launch is put down to."""
    text = " ".join(end.message for end in ends if end.code == codes.NUMERICAL and "that host" in end.message)
    named = re.findall(r"rank (\d+) on ", text)
    if any(end.code == codes.HANG for end in ends):
        for _ in range(int(SUMMARY_WAIT / 0.1)):  # one rank writes the summary, perhaps after this host's have ended
            with contextlib.suppress(OSError):
                summaries = [path for path in run.glob("hangs/*/summary.txt") if path.stat().st_mtime >= started - 1.0]
                if summaries:
                    newest = max(summaries, key=lambda path: path.stat().st_mtime)
                    named += re.findall(r"at fault: rank (\d+)", newest.read_text(errors="replace"))
                    break
            time.sleep(0.1)
    return tuple(sorted({int(rank) for rank in named}))


def _joined(seen: RankEnd, own: RankEnd | None) -> RankEnd:
    """A rank's own words, except for the code when a signal came before it could return it: other than torchrun's SIGTERM."""
    if own is None:
        return seen
    killed = seen.code < 0 and seen.code != -signal.SIGTERM
    return own._replace(local_rank=seen.local_rank, code=seen.code if killed else own.code)


def _rank_end(content: dict[str, Any], local_rank: int) -> RankEnd | None:
    """From the file that TORCHELASTIC_ERROR_FILE names; None if it lacks the exit code (torch writes such files, too)."""
    message = content.get("message")
    extra = message.get("extraInfo") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(extra, dict):
        return None
    try:
        by_signal = extra.get("signal")
        return RankEnd(
            rank=int(extra["rank"]),
            local_rank=int(extra.get("local_rank", local_rank)),
            code=-int(by_signal) if by_signal else int(extra["exit_code"]),
            time=float(extra["timestamp"]),
            phase=extra.get("phase"),
            step=None if extra.get("step") is None else int(extra["step"]),
            message=str(message.get("message", ""))[:500],
        )
    except (KeyError, TypeError, ValueError):
        return None


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
