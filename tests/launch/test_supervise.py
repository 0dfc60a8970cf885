"""The supervisor's loop, with ranks that do as a plan says and a stand-in for torchrun (tests/launch/torchrun.py)."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.agent import LOOK_AROUND
from launch.policy import Policy, waiting
from launch.supervise import main, parse, run_folder
from tests.launch.supervised import begin, family, gone, journal, notes, running, supervise, until
from tests.ranks import ROOT


def test_a_job_that_finishes(tmp_path: Path) -> None:
    code, said = supervise(tmp_path, [{"*": "save 3 > exit 0"}], "--nproc-per-node", "2")
    assert code == 0, said
    start, end = journal(tmp_path)
    assert (start["event"], start["processes"], start["newest"]) == ("start", "2", None)
    assert (end["event"], end["decision"], end["code"], end["why"], end["wait"]) == ("end", "stop", 0, "finished", 0.0)
    assert (end["ranks"], end["processes"], end["step"], end["newest"]) == ([], 2, 3, "step_00000003")
    options = json.loads((tmp_path / "supervise/torchrun_options").read_text())
    assert options["--max-restarts"] == "0" and options["--nnodes"] == "1" and "--rdzv-endpoint" not in options
    assert [path.name for path in (tmp_path / "supervise").glob("*/*")] == []  # what torchrun leaves does not pile up


@pytest.mark.parametrize("code", [2, 77, 78, 79])
def test_codes_that_stop_at_once(code: int, tmp_path: Path) -> None:
    answer, said = supervise(tmp_path, [{"*": "wait", "0": f"exit {code} so it is"}], "--nproc-per-node", "2")
    assert answer == code
    assert "so it is; ends with" in said
    assert len(journal(tmp_path, "start")) == 1 and journal(tmp_path, "end")[0]["decision"] == "stop"


def test_restarts_until_it_works(tmp_path: Path) -> None:
    """A kill, an error, a hang, a silent rank: after each, another start; and the journal has it all."""
    plan = [
        {"0": "wait", "1": "meet > kill"},
        {"*": "exit 1 oh"},
        {"0": "exit 76", "1": "wait"},  # of two that exit, the second may be ended before it can write
        {"*": "silent 9"},
        {"*": "save 5"},
    ]
    code, said = supervise(tmp_path, plan, "--nproc-per-node", "2", "--host", "here")
    assert code == 0, said
    ends = journal(tmp_path, "end")
    assert [end["decision"] for end in ends] == ["restart"] * 4 + ["stop"]
    assert [end["code"] for end in ends] == [137, 1, 76, 9, 0]
    assert {record["host"] for record in journal(tmp_path)} == {"here"}
    by_rank = {rank["rank"]: rank for rank in ends[0]["ranks"]}
    assert by_rank[1]["code"] == -9 and by_rank[0]["code"] == 75 and by_rank[0]["phase"] == "step"
    assert ends[2]["step"] == 41
    assert [rank["message"] for rank in ends[2]["ranks"] if rank["rank"] == 0] == ["code 76"]
    assert all(end["wait"] > 0 for end in ends[:-1])


def test_a_crash_loop_ends_and_waits_longer_each_time(tmp_path: Path) -> None:
    code, said = supervise(
        tmp_path, [{"*": "exit 3 always"}], "--max-restarts", "3", "--wait", "0.01", "--max-wait", "0.03", "--seed", "7"
    )
    assert code == 3
    ends = journal(tmp_path, "end")
    policy = Policy(3, 0.01, 0.03, f"7 {tmp_path.resolve()} braid")
    assert all(full / 2 <= end["wait"] <= full for full, end in zip((0.01, 0.02, 0.03), ends))
    assert [end["wait"] for end in ends] == [*(waiting(n, policy) for n in range(3)), 0.0]
    assert ends[-1]["why"] == "gave up after 3 restart(s) in a row and no checkpoint yet; rank 0: 3 in step 41: always"
    assert "gave up after 3 restart(s)" in said


def test_a_newer_checkpoint_ends_the_row(tmp_path: Path) -> None:
    crash = {"*": "exit 1"}
    plan = [crash, crash, {"*": "save 4 > exit 1"}, crash, crash, crash]
    code, _ = supervise(tmp_path, plan, "--max-restarts", "2")
    assert code == 1
    assert len(journal(tmp_path, "end")) == 5  # two in a row, one that counts anew, two in a row
    assert "since step_00000004" in journal(tmp_path, "end")[-1]["why"]


def test_preempted_stops_or_goes_on(tmp_path: Path) -> None:
    code, _ = supervise(tmp_path / "a", [{"*": "save 2 > exit 75"}])
    assert code == 75 and journal(tmp_path / "a", "end")[0]["why"] == "preempted"
    plan = [{"*": "save 2 > exit 75"}, {"*": "exit 0"}]
    code, _ = supervise(tmp_path / "b", plan, "--restart-preempted")
    assert code == 0 and [end["code"] for end in journal(tmp_path / "b", "end")] == [75, 0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_goes_to_the_ranks_which_save(number: int, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('[{"*": "wait together"}]')
    with running(begin(tmp_path, "--nproc-per-node", "2", "--restart-preempted", "--patience", "30")) as process:
        until(lambda: notes(tmp_path, 0) and notes(tmp_path, 1), process)
        process.send_signal(number)
        until(lambda: len(notes(tmp_path, 0)) > 1, process)
        process.send_signal(number)  # a scheduler may say it twice
        assert process.wait(30) == 75
    expected = "SIGUSR1" if number == signal.SIGUSR1 else "SIGTERM"
    assert [notes(tmp_path, rank)[1] for rank in (0, 1)] == [expected] * 2
    (end,) = journal(tmp_path, "end")
    assert end["why"] == f"stopped by {signal.Signals(number).name}" and end["newest"] == "step_00000099"
    assert end["launcher"] == 1  # torchrun has ended by itself, after its ranks


def test_a_second_signal_ends_torchrun(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('[{"*": "stubborn"}]')
    with running(begin(tmp_path, environment={"KILLS_AFTER": "1"})) as process:
        until(lambda: notes(tmp_path), process)
        below = family(process.pid)
        process.terminate()
        until(lambda: notes(tmp_path)[1:] == ["SIGTERM"], process)
        time.sleep(0.35)  # past --patience
        process.terminate()
        assert process.wait(30) == 75
        assert gone(below)
    assert "not cleanly" in journal(tmp_path, "end")[0]["why"]


def test_a_signal_before_there_are_ranks_and_between_two_starts(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('[{"*": "exit 1"}]')
    with running(begin(tmp_path, environment={"NEVER_MEETS": "1"})) as process:
        until(lambda: list(tmp_path.glob("supervise/torchrun_options")), process)
        process.terminate()
        assert process.wait(30) == 75
    assert notes(tmp_path) == []
    with running(begin(tmp_path, "--wait", "1000", "--max-wait", "1000")) as process:
        until(lambda: len(journal(tmp_path, "end")) == 2, process)
        process.terminate()
        assert process.wait(30) == 75
    assert journal(tmp_path)[-1]["why"] == "stopped by SIGTERM between two starts"


def test_two_supervisors_of_one_run(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('[{"*": "wait"}]')
    with running(begin(tmp_path)) as process:
        until(lambda: notes(tmp_path), process)
        code, said = supervise(tmp_path, [{}])
        assert code == 1 and f"is supervised on this host already, by process {process.pid};" in said
        assert len(notes(tmp_path)) == 1
        process.terminate()
        assert process.wait(30) == 75
    assert len(journal(tmp_path, "start")) == 1


def test_a_run_folder_that_another_job_holds(tmp_path: Path) -> None:
    """No torchrun is started for it, again and again; but a lock that is given up in time is waited for."""
    (tmp_path / "lease.json").write_text(json.dumps({"host": "n9", "pid": 77, "since": "noon"}))
    with (tmp_path / "lease.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, said = supervise(tmp_path, [{}], "--wait-for-run", "0.2")
        assert code == 1 and "is in use by process 77 on n9 since noon; stop that job first" in said
        assert journal(tmp_path, "start") == [] and journal(tmp_path)[0]["decision"] == "stop"
        with running(begin(tmp_path)) as process:
            time.sleep(0.5)
            assert notes(tmp_path) == []
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert process.wait(30) == 0


def test_a_run_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with running(begin(tmp_path / "file" / "run")) as process:
        said = process.communicate(timeout=30)[0]
    assert process.returncode == 1 and "the run folder cannot be used" in said and "Traceback" not in said


def test_a_file_server_that_is_away_for_a_while(tmp_path: Path) -> None:
    """The supervisor does not die of what it cannot write; it tries again."""
    (tmp_path / "plan.json").write_text('[{"*": "wait"}, {"*": "exit 0"}]')
    with running(begin(tmp_path, "--wait", "1", "--max-wait", "1", "--host", "h", "--max-restarts", "100")) as process:
        until(lambda: notes(tmp_path), process)
        (tmp_path / "supervise").rename(tmp_path / "away")
        (tmp_path / "supervise").touch(exist_ok=False)
        os.kill(int(notes(tmp_path)[0].split()[1]), signal.SIGKILL)
        until(lambda: any("could not start torchrun" in end["why"] for end in journal(tmp_path, "end")), process)
        (tmp_path / "supervise").unlink()
        assert process.wait(30) == 0


def test_what_nohup_has_ignored_stays_ignored(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('[{"*": "wait"}]')
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = begin(tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    with running(process):
        until(lambda: notes(tmp_path), process)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None and len(notes(tmp_path)) == 1
        process.terminate()
        assert process.wait(30) == 75


def test_the_lease_of_a_training_job_is_seen(tmp_path: Path) -> None:
    from launch.supervisor import held
    from pretrain.checkpoint.lease import Lease

    assert held(tmp_path) is None
    with Lease(tmp_path):
        assert held(tmp_path) == f"process {os.getpid()} on " + held(tmp_path).split(" on ")[1]  # type: ignore[union-attr]
        assert str(os.getpid()) in str(held(tmp_path))
    assert held(tmp_path) is None


def pair(run: Path, nodes: str, *options: str, plans: dict[str, str]) -> dict[str, subprocess.Popen[str]]:
    """Two hosts of one job, a rank each; `plans` says what the rank of each host does, launch after launch.

    Hosts wait hardly at all before they start again. Where one must come first, the other's rank waits for its note.
    """
    run.mkdir(exist_ok=True)
    ranks = {"n0": "0", "n1": "1"}
    longest = max(len(plan.split(" | ")) for plan in plans.values())
    columns = {ranks[host]: plan.split(" | ") for host, plan in plans.items()}
    plan = [{rank: steps[min(n, len(steps) - 1)] for rank, steps in columns.items()} for n in range(longest)]
    (run / "plan.json").write_text(json.dumps(plan))
    return {
        host: begin(run, "--nnodes", nodes, "--rdzv-endpoint", "x:1", "--host", host, *options,
                    environment={"FIRST_RANK": rank})
        for host, rank in ranks.items()
    }  # fmt: skip


def ends(processes: dict[str, subprocess.Popen[str]]) -> dict[str, int]:
    try:
        return {host: process.wait(60) for host, process in processes.items()}
    finally:
        for process in processes.values():
            with running(process):
                pass


def test_what_ends_the_job_on_one_host_ends_it_on_all(tmp_path: Path) -> None:
    codes = ends(
        pair(tmp_path, "2", plans={"n0": "meet > exit 77 no data", "n1": "meet > noted n0 end > exit 1 | exit 0"})
    )
    assert codes == {"n0": 77, "n1": 77}
    assert len(notes(tmp_path, 1)) == 1  # it has not begun again
    assert [record["why"].split(":")[0] for record in journal(tmp_path, "after")] == ["n0"]


def test_a_host_that_fails_first_again_and_again_leaves_an_elastic_job(tmp_path: Path) -> None:
    plans = {"n0": "meet > noted n1 end > exit 1 | noted n1 leave > exit 0", "n1": "meet > kill | exit 0"}
    codes = ends(pair(tmp_path, "1:2", "--exclude-after", "1", plans=plans))
    assert codes == {"n0": 0, "n1": 137}
    (left,) = (record for record in journal(tmp_path, "after") if record["host"] == "n1")
    assert (
        left["decision"] == "leave"
        and left["scope"] == "host"
        and "n1 is excluded: first to fail 1 time(s) (killed)" in left["why"]
    )
    assert (tmp_path / "excluded_hosts").read_text() == "n1\n"
    # It does not come back, until it is let in again.
    again = ["--nnodes", "1:2", "--rdzv-endpoint", "x:1", "--host", "n1", "--exclude-after", "1"]
    code, said = supervise(tmp_path, [{}], *again)
    assert code == 1 and "--readmit n1" in said and len(journal(tmp_path, "start")) == 3
    assert main(["--readmit", "n1", str(tmp_path)]) == 0
    assert supervise(tmp_path, [{}], *again)[0] == 0
    assert not (tmp_path / "excluded_hosts").exists()


@pytest.mark.parametrize(("slurm", "code"), [(True, 75), (False, 1)])
def test_a_job_of_so_many_hosts_ends_when_one_is_excluded(slurm: bool, code: int, tmp_path: Path) -> None:
    plans = {"n0": "meet > noted n1 end > exit 1 | exit 0", "n1": "meet > kill | exit 0"}
    options = ["--exclude-after", "1", *(["--slurm"] if slurm else [])]
    assert ends(pair(tmp_path, "2", *options, plans=plans)) == {"n0": code, "n1": code}
    assert (tmp_path / "excluded_hosts").read_text() == "n1\n"
    assert len(journal(tmp_path, "start")) == 2


def test_a_numerical_fault_on_one_host(tmp_path: Path) -> None:
    """All ranks end with 79 and name the rank; its host leaves, the other goes on."""
    told = "meet > exit 79 step 9: rank 1 on n1: 3 errors of the hardware in this run; run again without that host"
    codes = ends(pair(tmp_path, "1:2", plans={"n0": f"{told} | exit 0", "n1": told}))
    assert codes == {"n0": 0, "n1": 79}
    assert (tmp_path / "excluded_hosts").read_text() == "n1\n"


def test_a_numerical_fault_of_nobody_ends_an_elastic_job(tmp_path: Path) -> None:
    codes = ends(
        pair(
            tmp_path,
            "1:2",
            plans={"n0": "meet > exit 79 10 steps in a row | exit 0", "n1": "meet > exit 79 10 steps in a row"},
        )
    )
    assert codes == {"n0": 79, "n1": 79} and not (tmp_path / "excluded_hosts").exists()


@contextlib.contextmanager
def outlasting(run: Path, begun: Callable[[], object], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """n1, with this in its environment, when n0 has noted the end of their job after n1 had begun. n1 ends with 0, too."""
    (run / "plan.json").write_text('[{"*": "exit 0"}]')
    nodes = ["--nnodes", "1:2", "--rdzv-endpoint", "x:1"]
    with running(begin(run, *nodes, "--host", "n1", environment=environment)) as process:
        until(begun, process)
        assert supervise(run, [{}], *nodes, "--host", "n0")[0] == 0
        yield process
        assert process.wait(30) == 0


def test_hosts_that_do_not_meet_learn_that_the_job_is_over(tmp_path: Path) -> None:
    def started() -> object:
        return (tmp_path / "supervise.jsonl").exists() and journal(tmp_path, "start")

    with outlasting(tmp_path, started, NEVER_MEETS="1"):
        pass
    assert journal(tmp_path, "after")[0]["why"] == "n0: finished"


def test_a_host_whose_ranks_have_finished_says_so_itself(tmp_path: Path) -> None:
    """Its torchrun takes longer to end than another host's, which notes the end of the job before it."""
    with outlasting(tmp_path, lambda: notes(tmp_path), ENDS_WITH=str(tmp_path / "end"), LAST_WORDS="100"):
        time.sleep(LOOK_AROUND + 0.5)  # it sees the note, and leaves its torchrun alone
        (tmp_path / "end").touch()
    said = [(end["host"], end["code"], end["decision"], end["why"]) for end in journal(tmp_path, "end")]
    assert said == [("n0", 0, "stop", "finished"), ("n1", 0, "stop", "finished")]
    assert journal(tmp_path, "after") == []


def test_a_signal_after_the_ranks_have_finished(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('[{"*": "exit 0"}]')
    environment = {"ENDS_WITH": str(tmp_path / "end"), "LAST_WORDS": "100"}
    with running(begin(tmp_path, environment=environment)) as process:
        until(lambda: notes(tmp_path), process)
        until(lambda: len(family(process.pid)) == 1, process)  # torchrun alone
        process.terminate()
        time.sleep(0.5)  # it takes the signal, and leaves its torchrun alone
        (tmp_path / "end").touch()
        assert process.wait(30) == 0
    assert journal(tmp_path, "end")[0]["why"] == "finished"


def test_a_torchrun_that_never_ends_is_ended_once_the_job_is_over(tmp_path: Path) -> None:
    with outlasting(tmp_path, lambda: notes(tmp_path), ENDS_WITH=str(tmp_path / "never"), LAST_WORDS="1"):
        pass
    assert journal(tmp_path, "after")[0]["why"] == "n0: finished"


# ---------------------------------------------------------------------------------------------------------------- command line


def test_the_run_folder_comes_from_the_command(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("run: runs/of_the_file\n")
    assert run_folder(["main.py", "--config", str(config)]) == Path("runs/of_the_file")
    assert run_folder(["main.py", f"--config={config}", "run=a", "run=b"]) == Path("b")
    with pytest.raises(ValueError, match="neither run=FOLDER"):
        run_folder(["main.py", "x=1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no script; give it after --"),
        (["--", "main.py"], "name the run folder with --run"),
        (["--", "main.py", "--config", "none.yaml"], "none.yaml"),
        (["--nnodes", "2", "--", "main.py", "run=x"], "--rdzv-endpoint"),
        (["--nnodes", "3:2", "--", "main.py", "run=x"], "MIN is at least 1"),
        (["--nnodes", "many", "--", "main.py", "run=x"], "neither a number nor MIN:MAX"),
    ],
)
def test_bad_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_it_imports_nothing_that_could_fail_or_take_long() -> None:
    code = (
        "import sys, launch.supervise, launch.supervisor; "
        "print(sorted({'torch', 'numpy', 'pydantic', 'yaml', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
