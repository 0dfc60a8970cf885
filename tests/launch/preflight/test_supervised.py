"""A supervised job whose hosts are checked first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import fitness
from launch.outcome import Outcome
from launch.supervise import main, parse
from launch.supervisor import Supervisor
from tests.launch.stand_ins import JOB_OF_SLURM, install
from tests.launch.supervised import QUICK, journal, notes
from tests.ranks import QUIET, ROOT

HERE = Path(__file__).parent
# A preflight that says what a file says, for the host's name: "" or what has failed; after so many seconds, or on a request.
START = f"""
import json, os, sys
from pathlib import Path
import launch.fitness, launch.outcome, launch.supervisor
from launch.supervise import main
launch.supervisor.TORCHRUN = Path({str(HERE.parent / "torchrun.py")!r})
launch.outcome.SUMMARY_WAIT = 0.2

def unfit(run, file, requests):
    import time
    wait, text = json.loads((run / "preflights.json").read_text())[file.name.split(".")[0]]
    end = time.monotonic() + wait
    while time.monotonic() < end and requests.first is None:
        time.sleep(0.02)
    return text

if os.environ.get("STAND_IN"):
    launch.fitness.unfit = unfit
sys.exit(main())
"""


class Asked:
    """Requests that nobody has made."""

    first = None
    name = None
    insistent = False


def begin(run: Path, host: str, *options: str, stand_in: bool = True, rank: str = "0") -> subprocess.Popen[str]:
    environ = {**os.environ, **QUIET, "STAND_IN": "1" if stand_in else "", "FIRST_RANK": rank}
    command = [sys.executable, "-c", START, *QUICK, "--preflight", "--host", host, *options, "--"]
    return subprocess.Popen(
        [*command, str(HERE.parent / "worker.py"), f"run={run}"], cwd=ROOT, env=environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ends(*processes: subprocess.Popen[str]) -> tuple[list[int], str]:
    try:
        said = "".join(process.communicate(timeout=60)[0] for process in processes)
        return [process.returncode for process in processes], said
    finally:
        for process in processes:
            process.kill()


def plan(run: Path, **preflights: tuple[float, str | None]) -> None:
    run.mkdir(exist_ok=True)
    (run / "plan.json").write_text('[{"*": "exit 0"}]')
    (run / "preflights.json").write_text(json.dumps(preflights))


def test_a_host_that_is_fit_begins(tmp_path: Path) -> None:
    plan(tmp_path, n0=(0.0, None))
    codes, said = ends(begin(tmp_path, "n0"))
    assert codes == [0], said
    assert [record["event"] for record in journal(tmp_path)] == ["preflight", "start", "end"]


def test_a_host_that_is_not_is_named_and_the_job_does_not_start(tmp_path: Path) -> None:
    plan(tmp_path, n0=(0.0, "gpu 3: 2 uncorrected memory error(s)"))
    codes, said = ends(begin(tmp_path, "n0"))
    assert codes == [1] and "n0 has failed its preflight: gpu 3: 2 uncorrected memory error(s); ends with 1" in said
    assert [record["event"] for record in journal(tmp_path)] == ["preflight", "after"] and notes(tmp_path) == []
    assert journal(tmp_path)[-1]["decision"] == "stop" and journal(tmp_path)[-1]["scope"] == "job"


@pytest.mark.parametrize("waits", [(0.0, 1.0), (1.0, 0.0)], ids=["the fit one first", "the unfit one first"])
def test_a_job_of_two_hosts_does_not_start_without_one(waits: tuple[float, float], tmp_path: Path) -> None:
    """Whichever is done first: the fit host does not wait at the rendezvous for the one that will not come."""
    plan(tmp_path, n0=(waits[0], None), n1=(waits[1], "disk_space: full"))
    job = ["--nnodes", "2", "--rdzv-endpoint", "x:1"]
    os.environ["NEVER_MEETS"] = "1"
    try:
        second = begin(tmp_path, "n1", *job, rank="1")
        first = begin(tmp_path, "n0", *job)
    finally:
        del os.environ["NEVER_MEETS"]
    codes, said = ends(first, second)
    assert codes == [1, 1], said
    assert notes(tmp_path) == [] and "n1: n1 has failed its preflight: disk_space: full" in said


def test_a_failure_noted_between_the_look_around_and_the_start_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = parse(
        ["--preflight", "--nnodes", "2", "--rdzv-endpoint", "x:1", "--host", "n0", "--", "x.py", f"run={tmp_path}"]
    )
    here = Supervisor(options, Asked())  # type: ignore[arg-type]
    monkeypatch.setattr(fitness, "unfit", lambda *_: None)
    monkeypatch.setattr(here, "_pause", lambda seconds: None)
    monkeypatch.setattr(here, "_launch", lambda started: Outcome((), 1, 0))
    assert here._preflight() is None
    note = {"event": "after", "host": "n1", "supervisor": "other", "job": here.job, "decision": "stop", "code": 1,
            "scope": "job", "why": "n1 has failed its preflight"}  # fmt: skip
    here.journal.append(note)
    decision = here._once()
    assert decision is not None and (decision.action, decision.code) == ("stop", 1)
    assert decision.why == "n1: n1 has failed its preflight"
    # It counts for the first start only: what was noted before a later one is past.
    assert here._once() is None


def test_an_elastic_job_goes_on_without_it(tmp_path: Path) -> None:
    plan(tmp_path, n0=(0.0, None), n1=(0.0, "clock: 1970"))
    job = ["--nnodes", "1:2", "--rdzv-endpoint", "x:1"]
    codes, said = ends(begin(tmp_path, "n0", *job), begin(tmp_path, "n1", *job, rank="1"))
    assert codes == [0, 1], said
    (left,) = journal(tmp_path, "after")
    assert (left["host"], left["decision"], left["scope"]) == ("n1", "leave", "host")


def test_whose_failure_counts_for_a_host_that_begins_later() -> None:
    def note(host: str, event: str, when: float, **more: object) -> dict[str, object]:
        return {"host": host, "job": "j.0", "event": event, "time": when, "scope": "job", **more}

    bad = note("n1", "after", 100.0, unfit=True, why="broken", code=1)
    assert fitness.unfit_host([note("n1", "preflight", 99.0), bad], "j.0", "n0", 110.0) == bad
    assert fitness.unfit_host([bad, note("n1", "preflight", 105.0)], "j.0", "n0", 110.0) is None  # mended, it seems
    assert fitness.unfit_host([bad], "j.0", "n0", 400.0) is None  # of an earlier job of that name
    assert fitness.unfit_host([bad], "j.1", "n0", 110.0) is None
    assert fitness.unfit_host([bad], "j.0", "n1", 110.0) is None
    assert fitness.unfit_host([{**bad, "scope": "host"}], "j.0", "n0", 110.0) is None  # an elastic job goes on


def test_an_old_failure_does_not_stop_a_new_job(tmp_path: Path) -> None:
    plan(tmp_path, n0=(0.0, "gpu 3: broken"))
    assert ends(begin(tmp_path, "n0"))[0] == [1]
    plan(tmp_path, n0=(0.0, None))
    assert ends(begin(tmp_path, "n0"))[0] == [0]


def test_told_to_stop_meanwhile(tmp_path: Path) -> None:
    plan(tmp_path, n0=(100.0, "whatever"))  # the signal ends it
    process = begin(tmp_path, "n0")
    while not (tmp_path / "supervise.jsonl").exists():
        time.sleep(0.02)
        assert process.poll() is None
    process.terminate()
    codes, said = ends(process)
    assert codes == [75] and "stopped by SIGTERM before the first start" in said and notes(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "rows", "expected"),
    [
        (0, [("shm", "", "pass", "x")], None),
        (1, [("ecc", "gpu 3", "fail", "2 errors"), ("shm", "", "pass", "x"), ("clock", "", "fail", "1970")],
         "gpu 3: 2 errors; clock: 1970"),
        (1, [("a", str(n), "fail", "bad") for n in range(5)], "0: bad; 1: bad; 2: bad; and 2 more"),
        (-9, None, "preflight ended with -9"),
        (2, None, "preflight ended with 2"),
    ],
)  # fmt: skip
def test_what_is_made_of_a_preflight(
    code: int, rows: list[tuple[str, ...]] | None, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "n0.preflight.json"
    file.write_text("of an earlier start")

    def run(command: list[str], requests: object, overtaken: object) -> int:
        assert command[1:] == ["-m", "launch.preflight", "--run", str(tmp_path), "--json", str(file)]
        assert not file.exists()
        if rows is not None:
            keys = ("check", "subject", "status", "text")
            file.write_text(json.dumps({"results": [dict(zip(keys, row)) for row in rows]}))
        return code

    monkeypatch.setattr(fitness.agent, "run", run)
    assert fitness.unfit(tmp_path, file, Asked()) == expected  # type: ignore[arg-type]


def test_the_real_preflight_of_a_supervised_job(tmp_path: Path) -> None:
    """Its own command, on this machine, made to fail by a variable that hurts."""
    plan(tmp_path)
    os.environ["GLOO_SOCKET_IFNAME"] = "nowhere0"
    try:
        codes, said = ends(begin(tmp_path, "n0", stand_in=False))
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]
    assert codes == [1] and "preflight of " in said and "passed" in said, said
    assert "n0 has failed its preflight: " in said and "GLOO_SOCKET_IFNAME=nowhere0: there is no nowhere0 here" in said
    assert json.loads((tmp_path / "supervise" / "n0.preflight.json").read_text())["failed"] is True


def test_the_option_of_the_slurm_script(tmp_path: Path) -> None:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "NCCL", "HSA"))}
    environ = {**install(tmp_path, {**ours, **QUIET}), **JOB_OF_SLURM, "SLURM_GPUS_ON_NODE": "8", "STEP_ENDS_WITH": "0"}
    for given in ([], ["--preflight", "--ranks-per-node", "4"]):
        command = ["bash", str(ROOT / "launch/slurm.sh"), *given, "configs/runs/quickstart.yaml", "run=/nowhere"]
        done = subprocess.run(command, cwd="/", env=environ, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        line = json.loads((tmp_path / "srun").read_text())
        line = line[line.index("launch.supervise") : line.index("--")]
        assert ("--preflight" in line) == bool(given)
        assert line[line.index("--nproc-per-node") + 1] == ("4" if given else "8")


def test_help_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--preflight" in capsys.readouterr().out
