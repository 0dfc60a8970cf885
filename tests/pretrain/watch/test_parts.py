"""The watcher's pieces by themselves: what it learns, how it reads stacks, whom it blames."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.train import heartbeat
from pretrain.watch import process, report
from pretrain.watch.blame import Report, blame, spans, summary
from pretrain.watch.config import WatchdogConfig
from pretrain.watch.limits import FIRST, Limits
from pretrain.watch.process import Frame, frames, meets, place
from pretrain.watch.pulse import EVERYWHERE, NOTHING, PHASES, Beat, Pulse

SETTINGS = WatchdogConfig().model_dump()


def beats(limits: Limits, *told: tuple[str, float]) -> None:
    """Phases that take so many seconds, looked at four times a second."""
    count = limits.beat.count if limits.beat else 0
    for phase, seconds in told:
        count += 1
        limits.look(Beat(count, phase, 1, NOTHING), 0.25)
        for _ in range(round(seconds * 4)):
            limits.look(Beat(count, phase, 1, NOTHING), 0.25)


def test_a_limit_is_the_floor_or_a_multiple_of_the_longest_seen() -> None:
    limits = Limits()
    beats(limits, ("step", 5.0))
    assert limits.limit({}) == FIRST  # no configuration yet
    assert limits.limit(SETTINGS) == 3600  # the first step has no past
    beats(limits, ("step", 2.0), ("step", 0.0))
    assert limits.limit(SETTINGS) == 180
    beats(limits, ("step", 30.0), ("step", 1.0), ("step", 1.0))
    assert limits.longest["step"] == 30 and limits.limit(SETTINGS) == 300
    beats(limits, ("save", 1.0))
    assert limits.limit(SETTINGS) == 3600  # the first save
    beats(limits, ("step", 1.0), ("save", 1.0))
    assert limits.limit(SETTINGS) == 900
    beats(limits, ("evaluation", 40.0), ("evaluation", 0.0))
    assert limits.limit(SETTINGS) == 400
    beats(limits, ("end", 1.0))
    assert limits.limit(SETTINGS) == 900
    for phase in ("start", "rendezvous", "data", "model", "load"):
        beats(limits, (phase, 1.0), (phase, 1.0))
        assert limits.limit(SETTINGS) == 3600


# Hundredths of a second, recorded on two cores that five processes shared: around an evaluation, with the longest of 200 steps.
BUSY = (
    ("step", (15, 29, 21, 11, 20, 8, 12, 14, 23, 15)), ("evaluation", (17, 8)), ("step", (0,)), ("save", (2,)),
    ("step", (28, 61, 6, 3, 3, 1, 2, 31)),
)  # fmt: skip


def test_steps_on_a_busy_machine_raise_no_alarm() -> None:
    """At the default factor, with a floor that says nothing."""
    limits, count = Limits(), 0
    for phase, durations in BUSY:
        for hundredths in durations:
            count += 1
            for _ in range(1 + hundredths):
                limits.look(Beat(count, phase, 1, NOTHING), 0.01)
                assert limits.seconds <= limits.limit(SETTINGS | {"floor": 0.5})


def test_time_in_which_the_watcher_was_away_does_not_count() -> None:
    limits = Limits()
    limits.look(Beat(1, "step", 1, NOTHING), 0.2)
    limits.look(Beat(1, "step", 1, NOTHING), 7200.0)  # a laptop that was closed
    assert limits.seconds == pytest.approx(1.2)
    limits.look(Beat(2, "step", 2, NOTHING), 0.2)
    assert limits.seconds == 0


def test_the_pulse_crosses_a_fork_and_costs_microseconds() -> None:
    pulse = Pulse()
    assert pulse.read() == Beat(0, PHASES[0], -1, NOTHING) and pulse.facts() == {}
    pid = os.fork()
    if pid == 0:
        pulse.beat("step", 41)
        pulse.beat("save")
        pulse.keep(EVERYWHERE)
        pulse.tell(folder="x", error="é" * 400)
        pulse.tell(timeout=3.5)
        os._exit(0)
    os.waitpid(pid, 0)
    assert pulse.read() == Beat(2, "save", 41, EVERYWHERE)
    assert pulse.facts() == {"folder": "x", "error": "é" * 400, "timeout": 3.5}
    begin = time.process_time()
    for step in range(10_000):
        pulse.beat("step", step)
    assert (time.process_time() - begin) / 10_000 < 100e-6  # 1 to 2 us on a quiet machine: it is no system call


def test_without_a_watcher_a_beat_goes_nowhere() -> None:
    assert not heartbeat.watched()
    heartbeat.phase("step", 3)
    heartbeat.keep(EVERYWHERE)
    heartbeat.tell(error="none")


def test_unknown_phases_are_refused() -> None:
    with pytest.raises(AssertionError, match="lunch"):
        Pulse().beat("lunch")


STACKS = """Thread 0x00007f0000000222 [prefetch] (most recent call first):
  File "/usr/lib/python3.12/threading.py", line 355 in wait

Current thread 0x00007f0000000111 (most recent call first):
  File "/env/site-packages/torch/distributed/distributed_c10d.py", line 3021 in all_reduce
  File "/env/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "{root}parallel/processes.py", line 62 in sum
  File "{root}pretrain/train/step.py", line 41 in train_step
"""


def test_the_main_threads_stack_is_found_among_others() -> None:
    stack = frames(STACKS.format(root=process._ROOT), 0x7F0000000111)
    assert [frame.function for frame in stack] == ["all_reduce", "wrapper", "sum", "train_step"]
    assert meets(stack)
    assert place(stack) == (
        "all_reduce (/env/site-packages/torch/distributed/distributed_c10d.py:3021), "
        "called by sum (parallel/processes.py:62)"
    )
    other = frames(STACKS.format(root=process._ROOT), 0x7F0000000222)
    assert other == [Frame("/usr/lib/python3.12/threading.py", 355, "wait")] and not meets(other)
    assert frames(STACKS, 0x111) == [] and place([]) == "unknown" and not meets([])


def test_the_state_of_a_process_is_read_from_outside() -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert process.state(sleeper.pid) in ("running", "sleeping", process.STATES["D"])
        sleeper.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 10
        while process.state(sleeper.pid) != "stopped by a signal":
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        sleeper.kill()
        sleeper.wait()
    assert process.state(sleeper.pid) == "unknown"


def of(rank: int, **changes: object) -> Report:
    """A rank that waits in step 41."""
    usual = Report(rank, "n1", "step", 41, 100, 183.0, 180.0, "sleeping", True, "all_reduce (x.py:1)")
    return dataclasses.replace(usual, **changes)  # type: ignore[arg-type]


def test_blame() -> None:
    def ranks(*reports: Report, world: int = 4) -> list[int]:
        return list(blame(reports, world))

    assert blame([of(0), of(1, state="stopped by a signal", meets=False), of(2), of(3)], 4) == {
        1: "stopped by a signal"
    }
    assert ranks(of(0), of(2), of(3)) == [1]
    assert ranks(of(0), of(2), of(3, state="stopped by a debugger")) == [1, 3]
    assert ranks(of(0), of(1), of(2, meets=False, place="match (re.py:2)"), of(3)) == [2]
    # Also when it is not behind: it counts as many beats as those that wait for it.
    assert ranks(of(0), of(1), of(2, meets=False, count=101), of(3)) == [2]
    assert ranks(of(0), of(1), of(2, meets=False, place="unknown"), of(3)) == []
    assert ranks(of(0), of(1, count=99, step=40), of(2), of(3)) == [1]
    assert ranks(of(0), of(1), of(2), of(3)) == []
    assert ranks(*(of(rank, meets=False) for rank in range(4))) == []


def test_the_summary_names_ranks_phases_and_steps_and_says_alike_once() -> None:
    reports = [of(0), of(1, state="stopped by a signal", meets=False, place="unknown", step=40, count=98), of(2), of(3)]
    text = summary(reports, 4, "phase step, step 41: no progress for 183 s on rank 0 (limit 180 s)", "/runs/x/hangs/y")
    assert text.splitlines() == [
        "HANG: phase step, step 41: no progress for 183 s on rank 0 (limit 180 s)",
        "  at fault: rank 1 on n1, phase step, step 40: stopped by a signal",
        "  rank 0, 2-3: phase step, step 41, wait for others in all_reduce (x.py:1)",
        "  rank 1: phase step, step 40, stopped by a signal, in unknown",
        "  stacks of all threads: /runs/x/hangs/y",
    ]
    same = summary([of(0), of(1)], 2, "c", "w").splitlines()
    assert same[1] == "  nothing tells which rank is at fault: all wait, or work, in the same phase and step"
    apart = summary([of(0), of(1, place="all_gather (y.py:2)")], 2, "c", "w").splitlines()
    assert apart[1].startswith("  ranks wait in different places")
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_reports_are_shared_in_a_folder_of_which_few_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(7):
        old = tmp_path / "hangs" / f"old{number}"
        old.mkdir(parents=True)
        os.utime(old, (number, number))
    second = report.share(tmp_path, "new", of(1, note="a: b"), "stack of 1", 2, "called", 0.0)
    assert "HANG: called" in second  # alone, so it speaks
    first = report.share(tmp_path, "new", of(0), "stack of 0", 2, "over the limit", 0.0)
    assert first.startswith("HANG: called\n") and "rank 0: " in first and "rank 1: " in first
    assert report.share(tmp_path, "new", of(1, note="a: b"), "stack of 1", 2, "called", 0.0) == ""
    folder = tmp_path / "hangs" / "new"
    assert report.read(folder / "rank_00001.txt") == of(1, note="a: b")
    assert (folder / "rank_00001.txt").read_text().endswith("\n\nstack of 1")
    assert (folder / "summary.txt").read_text() == first + "\n"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["new", "old3", "old4", "old5", "old6"]


def test_a_file_system_that_does_not_answer_is_not_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    begin = time.monotonic()
    assert report.within(0.1, lambda: time.sleep(30)) is None and time.monotonic() - begin < 20
    assert report.within(10.0, lambda: 3) == 3

    def fails() -> None:
        raise OSError(28, "No space left on device")

    assert report.within(10.0, fails) is None
    assert "No space left on device" in capsys.readouterr().out
