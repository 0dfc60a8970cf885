"""What the end of a torchrun means, and what is done about it: pure functions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.outcome import Outcome, RankEnd, at_fault, read
from launch.policy import Policy, decide, waiting

POLICY = Policy(max_restarts=3, wait=4.0, max_wait=20.0, seed="s")


def ended(*codes: int, launcher: int = 1, **more: object) -> Outcome:
    ends = tuple(RankEnd(rank, rank, code, 100.0 + rank) for rank, code in enumerate(codes) if code)
    return Outcome(ends, launcher, len(codes), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ((0, 0), 0),
        ((75, 75), 75),
        ((0, 75), 75),
        ((1, 75), 1),  # torchrun's own SIGTERM made the second leave: no preemption
        ((75, 1), 1),
        ((-15, 1), 1),
        ((1, -9), 1),  # the first to fail
        ((-9, 1), 137),
        ((1, 1, 76), 76),  # one speaks for the job, the others' error is in its wake
        ((1, 79), 79),
        ((77, 76), 77),
        ((-15, -15), 143),
    ],
)
def test_one_code_for_all_ranks(codes: tuple[int, ...], code: int) -> None:
    assert ended(*codes, launcher=0 if not any(codes) else 1).code == code


def test_the_code_of_a_torchrun_without_failing_ranks() -> None:
    assert ended(launcher=-9).code == 137 and ended(launcher=2).code == 2
    assert ended(launcher=1, trouble="torchrun: RendezvousTimeoutError").text() == "torchrun: RendezvousTimeoutError"


@pytest.mark.parametrize(
    ("code", "action"),
    [(0, "stop"), (1, "restart"), (2, "stop"), (75, "stop"), (76, "restart"), (77, "stop"), (78, "stop"), (79, "stop"),
     (-9, "restart"), (-11, "restart"), (3, "restart")],
)  # fmt: skip
def test_the_decision_by_exit_code(code: int, action: str) -> None:
    decision = decide(ended(code, launcher=1 if code else 0), None, 0, None, POLICY)
    assert (decision.action, decision.code) == (action, 128 - code if code < 0 else code)
    assert (decision.wait > 0) == (action == "restart")


def test_preempted_goes_on_where_it_may_unless_this_supervisor_was_told_to_stop() -> None:
    policy = POLICY._replace(restart_preempted=True)
    assert decide(ended(75, 75), None, 0, None, policy).action == "restart"
    assert decide(ended(75, 75), "SIGTERM", 0, None, policy)[:2] == ("stop", 75)


@pytest.mark.parametrize(
    ("code", "answer"), [(0, 0), (75, 75), (1, 75), (76, 75), (-9, 75), (2, 2), (77, 77), (79, 79)]
)
def test_told_to_stop(code: int, answer: int) -> None:
    """What had to stop goes back into the queue, even when its last save failed; but not a job that can go nowhere."""
    decision = decide(ended(code, launcher=1 if code else 0), "SIGUSR1", 0, None, POLICY)
    assert (decision.action, decision.code) == ("stop", answer)


def test_gives_up_after_restarts_in_a_row_without_a_newer_checkpoint() -> None:
    for restarts in range(3):
        assert decide(ended(-9), None, restarts, "step_00000010", POLICY).action == "restart"
    decision = decide(ended(-9), None, 3, "step_00000010", POLICY)
    assert (decision.action, decision.code, decision.gave_up) == ("stop", 137, True)
    assert decision.why == "gave up after 3 restart(s) in a row since step_00000010; rank 0: SIGKILL"
    assert "no checkpoint yet" in decide(ended(-9), None, 3, None, POLICY).why


def test_waits_double_up_to_the_cap_with_half_of_it_by_the_seed() -> None:
    waits = [waiting(restarts, POLICY) for restarts in range(8)]
    for restarts, wait in enumerate(waits):
        full = min(20.0, 4.0 * 2**restarts)
        assert full / 2 <= wait <= full
    assert waits == [waiting(restarts, POLICY) for restarts in range(8)]  # the same on every host of the job
    assert waits != [waiting(restarts, POLICY._replace(seed="another job")) for restarts in range(8)]
    assert len({wait / min(20.0, 4.0 * 2**n) for n, wait in enumerate(waits)}) == 8
    assert waiting(10**6, POLICY) <= 20.0


def error_file(folder: Path, local_rank: int, **extra: object) -> None:
    place = folder / "id_x" / "attempt_0" / str(local_rank)
    place.mkdir(parents=True, exist_ok=True)
    told = {"timestamp": "100", "exit_code": 1, "rank": local_rank, "local_rank": local_rank, "signal": None, **extra}
    (place / "error.json").write_text(json.dumps({"message": {"message": "why", "extraInfo": told}}))


def test_reads_what_torchrun_and_the_ranks_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.outcome.SUMMARY_WAIT", 0.1)
    rows = [{"rank": 4, "local_rank": 0, "code": 76, "time": 100}, {"rank": 5, "local_rank": 1, "code": -9, "time": 90}]
    (tmp_path / "torchrun.json").write_text(json.dumps({"failures": rows}))
    error_file(tmp_path, 0, rank=4, exit_code=76, phase="save", step=9)
    (tmp_path / "id_x/attempt_0/1").mkdir()
    (tmp_path / "id_x/attempt_0/1/error.json").write_text('{"message": "torn')
    outcome = read(tmp_path, 1, tmp_path, 0.0)
    assert outcome.ranks == (RankEnd(4, 0, 76, 100.0, "save", 9, "why"), RankEnd(5, 1, -9, 90.0))
    assert outcome.code == 76 and outcome.processes == 2
    assert outcome.text() == "rank 4: 76 in save, step 9: why"


def test_reads_error_files_alone_when_torchrun_was_killed(tmp_path: Path) -> None:
    error_file(tmp_path, 0, exit_code=-9, signal=9)
    outcome = read(tmp_path, -9, tmp_path, 0.0)
    assert [end.code for end in outcome.ranks] == [-9] and outcome.code == 137
    assert read(tmp_path, 0, tmp_path, 0.0).ranks == ()  # a rank of an earlier round, which was replaced


def test_what_the_watcher_writes_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.watch.outcome import record
    from pretrain.watch.pulse import Pulse

    place = tmp_path / "id_x/attempt_0/0"
    place.mkdir(parents=True)
    monkeypatch.setattr("launch.outcome.SUMMARY_WAIT", 0.1)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(place / "error.json"))
    monkeypatch.setenv("RANK", "6")
    monkeypatch.setenv("LOCAL_RANK", "0")
    pulse = Pulse()
    pulse.beat("save", 12)
    record("hang: told", 76, pulse.last())
    (end,) = read(tmp_path, -9, tmp_path, 0.0).ranks
    assert (end.rank, end.code, end.phase, end.step, end.message) == (6, 76, "save", 12, "hang: told")
    record("killed", -9, pulse.last())
    assert read(tmp_path, 1, tmp_path, 0.0).ranks[0].code == -9


def test_whose_fault_a_hang_is_comes_from_the_watchers_summary(tmp_path: Path) -> None:
    from pretrain.watch.blame import Report, summary

    waits = [Report(rank, f"n{rank}", "step", 5, 50, 9.0, 8.0, "sleeping", True, "all_reduce") for rank in (0, 2)]
    (tmp_path / "hangs/a").mkdir(parents=True)
    (tmp_path / "hangs/a/summary.txt").write_text(summary(waits, 3, "no progress", "there"))
    ends = (RankEnd(0, 0, 76, 100.0),)
    assert at_fault(ends, tmp_path, 0.0) == (1,)
    assert at_fault((RankEnd(0, 0, 1, 100.0),), tmp_path, 0.0) == ()  # an old summary, and no hang


def test_whose_fault_a_numerical_fault_is_comes_from_the_message() -> None:
    said = "step 9: rank 3 on n1, rank 12 on n7: 3 errors of the hardware in this run; run again without that host"
    assert at_fault((RankEnd(0, 0, 79, 1.0, message=said),), Path("/none"), 0.0) == (3, 12)
    assert at_fault((RankEnd(0, 0, 79, 1.0, message="10 steps in a row without an update"),), Path("/none"), 0.0) == ()
