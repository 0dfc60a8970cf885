"""`python -m launch.preflight` as a whole: names, exit codes, files, interruptions, and no tools at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.preflight import execute, report
from launch.preflight.__main__ import main, parse
from launch.preflight.catalogue import CHECKS, PEERS, choose
from launch.preflight.check import Check, Result, failed, passed, warned
from launch.preflight.execute import Report, guarded, run
from launch.preflight.node import Node
from tests.launch.preflight.machines import SABOTAGE, node
from tests.ranks import QUIET, ROOT

# Without torch, which takes two seconds to import; those that need it have tests of their own.
LIGHT = ["--skip", "torch,matmul,memory_test"]


def pre(tmp_path: Path, *argv: str, **machine: Any) -> tuple[int, dict[str, Any]]:
    """The exit code, and what is in the file."""
    machine = {"root": tmp_path, "environ": {"PATH": str(tmp_path)}, **machine}
    code = main([*argv, "--json", str(tmp_path / "x" / "found.json")], **machine)
    return code, json.loads((tmp_path / "x" / "found.json").read_text())


@pytest.mark.parametrize(
    ("found", "argv", "code", "status"),
    [
        (passed("well"), [], 0, "pass"),
        (warned("hm"), [], 0, "warn"),
        (warned("hm"), ["--strict"], 1, "fail"),
        (failed("bad"), [], 1, "fail"),
        (Result("not checked", "no tool"), ["--strict"], 0, "not checked"),
    ],
)
def test_exit_codes(
    found: Result, argv: list[str], code: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    checks = (
        Check("shm", "", lambda of: [found]),
        Check("numa", "", lambda of: [passed("well", "a [bold]subject", n=1)]),
    )
    monkeypatch.setattr("launch.preflight.session.CHECKS", checks)
    got, content = pre(tmp_path, "--only", "shm", "numa", *argv)
    assert got == code and content["failed"] == bool(code) and content["complete"] is True
    assert [row["status"] for row in content["results"]] == [status, "pass"]
    assert content["results"][1] == {
        "check": "numa", "subject": "a [bold]subject", "status": "pass", "text": "well", "values": {"n": 1},
    }  # fmt: skip
    assert content["counts"][status] == 1 + (status == "pass")
    said = capsys.readouterr().out
    assert found.text in said and "a [bold]subject" in said and "1 failed" in said if status == "fail" else True


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "matmull"], "there is no check 'matmull'; there are: matmul, "),
        (["--skip", "disk"], "there is no check 'disk'; there are: disk_sync, disk_space, "),
        (["--only", "peer_links"], "peer_links needs --peers, under torchrun"),
        (["--only", "shm", "--skip", "shm"], "--only and --skip leave no check to run"),
        (["--peers"], "start it under torchrun, as in: torchrun --nproc-per-node 2 -m launch.preflight --peers"),
        (["--limit", "0"], "0 is below 1.0"),
        (["--free", "much"], "'much' is no size"),
        (["--gpus", "-1"], "-1 is below 0"),
        (["runs/x"], "unrecognized arguments: runs/x"),
    ],
)
def test_bad_usage(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stop:
        parse(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_an_unknown_name_lists_every_valid_one_the_likeliest_first() -> None:
    with pytest.raises(ValueError, match="there is no check") as error:
        choose(["memorytest"], [], False)
    listed = str(error.value).partition("there are: ")[2].split(", ")
    assert listed[0] == "memory_test" and set(listed) == {check.name for check in CHECKS} | set(PEERS)


def test_names_may_be_given_with_commas_or_twice() -> None:
    assert parse(["--only", "shm,numa", "--only", "clock"]).names == ["shm", "numa", "clock"]
    assert parse(["--skip", "shm", "numa"]).names == [c.name for c in CHECKS if c.name not in ("shm", "numa")]


def test_the_list_of_checks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # no text is wrapped
    assert main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(check.name in said and check.looks_at in said for check in CHECKS) and "peer_links" in said
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_without_tools_and_files_nothing_that_needs_them_passes(tmp_path: Path) -> None:
    """A PATH without tools, and a machine without /proc and /sys."""
    code, content = pre(tmp_path, *LIGHT, "--run", str(tmp_path), "--free", "1")
    status: dict[str, set[str]] = {}
    for row in content["results"]:
        status.setdefault(row["check"], set()).add(row["status"])
        assert row["text"]
    known = {
        "limits",
        "shm",
        "disk_space",
        "disk_sync",
        "clock",
        "environment",
        "packages",
    }  # what every process can ask
    assert {name for name, found in status.items() if found != {"not checked"}} == known
    assert status["shm"] == {"fail"} and code == 1


def test_faults_all_at_once(tmp_path: Path) -> None:
    """Harmful variables, a wrong version, a full disk: each is told, none hides another."""
    (tmp_path / "constraints.txt").write_text("torch==1.0\n")
    environ = {"PATH": str(tmp_path), "CUDA_LAUNCH_BLOCKING": "1", "NCCL_P2P_DISABLE": "1"}
    code, content = pre(
        tmp_path, "--only", "environment", "packages", "disk_sync", "--run", str(tmp_path), environ=environ,
        constraints=tmp_path / "constraints.txt", python=(*SABOTAGE, "full_disk", "--"),
    )  # fmt: skip
    assert code == 1
    found = {(row["check"], row["subject"]): row["status"] for row in content["results"]}
    assert found[("environment", "CUDA_LAUNCH_BLOCKING=1")] == "fail"
    assert found[("environment", "NCCL_P2P_DISABLE=1")] == "warn"
    assert found[("packages", "torch")] == "warn" and found[("disk_sync", "")] == "fail"


def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    code = main(["--only", "shm", "--json", str(tmp_path / "file" / "x.json")], root=tmp_path)
    assert code == 1 and "error: " in capsys.readouterr().err and (tmp_path / "file").read_text() == ""


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE, text=True)
    report.write(tmp_path / "pipe", {"n": 1})
    assert json.loads(reader.communicate(timeout=30)[0]) == {"n": 1} and (tmp_path / "pipe").is_fifo()
    with pytest.raises(IsADirectoryError):
        report.write(tmp_path, {})


# ----------------------------------------------------------------------------------------------------------- running the checks


def quick(of: Node) -> list[Result]:
    return [passed("well")]


def test_a_check_that_fails_itself_is_neither_a_pass_nor_a_failure(tmp_path: Path) -> None:
    def broken(of: Node) -> list[Result]:
        raise KeyError("MemTotal")

    (result,) = guarded(Check("x", "", broken), node(tmp_path))
    assert result.status == "not checked" and result.text == "the check itself failed: KeyError: 'MemTotal'"


def test_a_check_that_never_ends_does_not_hold_the_others(tmp_path: Path) -> None:
    def never(of: Node) -> list[Result]:
        time.sleep(1000)
        return []

    told: list[list[str]] = []
    found = Report(["never", "quick"], {})
    of = node(tmp_path, limit=0.1, tool_limit=0.05)
    run([Check("never", "", never), Check("quick", "", quick)], of, lambda names: told.append(list(names)), found)
    assert [result.status for result in found.results] == ["fail", "pass"] and "hangs in the kernel" in found.results[
        0
    ].text
    assert told[-1] == ["never"]


def test_what_came_before_an_interrupt_is_kept(tmp_path: Path) -> None:
    def late(of: Node) -> list[Result]:
        time.sleep(1000)
        return []

    def waiting(names: list[str]) -> None:
        if names == ["late"]:
            raise KeyboardInterrupt

    found = Report(["quick", "late"], {})
    with pytest.raises(KeyboardInterrupt):
        run([Check("quick", "", quick), Check("late", "", late)], node(tmp_path), waiting, found)
    assert [(r.check, r.status, r.text) for r in found.results] == [
        ("quick", "pass", "well"),
        ("late", "not checked", "interrupted"),
    ]
    assert not found.complete


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_results_and_no_process(number: signal.Signals, tmp_path: Path) -> None:
    """A disk that hangs, and a person who has waited long enough."""
    code = (
        "import signal, sys; from pathlib import Path; from launch.preflight import session\n"
        "from launch.preflight.__main__ import main; real = session.run\n"
        f"waiting = lambda names: names == ['disk_sync'] and Path({str(tmp_path / 'others_ended')!r}).touch()\n"
        "session.run = lambda checks, node, _, found: real(checks, node, waiting, found)\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler); signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.exit(main(sys.argv[1:], python={(*SABOTAGE, 'hanging_disk', '--')!r}))"
    )
    file = tmp_path / "found.json"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--only", "disk_space", "disk_sync", "shm", "--run", str(tmp_path), "--json", str(file)],
        cwd=ROOT, env={**os.environ, **QUIET}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        until((tmp_path / "others_ended").exists)
        probe = until(lambda: children(process.pid))
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and err.endswith("interrupted\n") and "Traceback" not in err
    content = json.loads(file.read_text())
    assert content["complete"] is False
    status = {row["check"]: (row["status"], row["text"]) for row in content["results"]}
    assert status["disk_sync"] == ("not checked", "interrupted") and status["shm"][0] != "not checked"
    until(lambda: "disk.py" not in command_of(probe[0]))


def children(pid: int) -> list[int]:
    found = [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
    return [pid for pid in found if "disk.py" in command_of(pid)]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def until(true: Callable[[], Any], seconds: float = 30.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < end, "it has not come"
        time.sleep(0.02)
    return value


def test_low_memlock_as_a_shell_sets_it(tmp_path: Path) -> None:
    """The command itself, in a shell with limits, on a machine with an RDMA card."""
    of = node(tmp_path, {"sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE"})
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom launch.preflight.__main__ import main\n"
        f"sys.exit(main(root=Path({str(of.root)!r})))\n"
    )
    command = f"ulimit -l 64; ulimit -n 500; PYTHONPATH={ROOT} exec {sys.executable} {script} --only limits"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and "memlock 64.0 KiB: RDMA cards can register no more" in done.stdout
    assert "nofile 500, better 65536" in done.stdout


@pytest.mark.parametrize("columns", ["80", "40", None])
def test_tables_fit_narrow_terminals_and_are_wide_in_pipes(columns: str | None, tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | (
        {"COLUMNS": columns} if columns else {}
    )
    command = [sys.executable, "-m", "launch.preflight", "--only", "environment", "clock", "rdma", "packages"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**environ, "NCCL_P2P_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert max(map(len, lines[:-1])) <= int(columns or 200)
    words = " ".join(done.stdout.split())
    assert "not checked" in words and "NCCL_P2P_DISABLE=1" in words.replace(" ", "")
    assert "\x1b" not in done.stdout


def test_it_starts_without_torch(tmp_path: Path) -> None:
    """It must be able to say that torch is broken."""
    code = (
        "import sys; sys.modules['torch'] = None; from launch.preflight.__main__ import main; from pathlib import Path\n"
        f"code = main({LIGHT!r} + ['--run', {str(tmp_path)!r}]); print(code in (0, 1))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.rstrip().endswith("True")


def test_a_reason_is_written_out_once() -> None:
    rows = [Result("not checked", "no GPU", check=name) for name in ("devices", "ecc", "matmul")]
    told = report.once_each([*rows, Result("pass", "no GPU", check="x"), Result("not checked", "other", check="y")])
    assert [result.text for result in told] == ["no GPU", "as devices", "as devices", "no GPU", "other"]


def test_the_summary() -> None:
    results = [passed("a"), warned("b"), failed("c"), passed("d"), Result("not checked", "e")]
    assert report.summary(results) == "2 passed, 1 warning, 1 failed, 1 not checked"
    assert [result.status for result in execute.strict(results)] == ["pass", "fail", "fail", "pass", "not checked"]
