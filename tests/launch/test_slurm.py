"""launch/slurm.sh with stand-ins for Slurm's commands: what it starts, what it sets, and what goes back into the queue."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.launch.stand_ins import JOB_OF_SLURM, install
from tests.ranks import QUIET, ROOT


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "NCCL", "HSA"))}
    return {**install(tmp_path, {**ours, **QUIET}), **JOB_OF_SLURM, "SLURM_GPUS_ON_NODE": "8", "STEP_ENDS_WITH": "0"}


def slurm(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    given = arguments or ("configs/runs/quickstart.yaml", "run=/nowhere")
    command = ["bash", str(ROOT / "launch/slurm.sh"), *given]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=60, check=False)


def asked(tmp_path: Path) -> list[str]:
    """What scontrol was told to do."""
    lines = (tmp_path / "scontrol").read_text().splitlines() if (tmp_path / "scontrol").exists() else []
    return [line for line in lines if not line.startswith("show")]


def test_one_supervisor_a_node_that_meet_on_the_first(tmp_path: Path, environment: dict[str, str]) -> None:
    done = slurm(environment, "configs/runs/quickstart.yaml", "run=/nowhere", "train.steps=7")
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "srun").read_text())
    for option, value in {"--nodes": "2", "--ntasks": "2", "--ntasks-per-node": "1", "--cpu-bind": "none"}.items():
        assert line[line.index(option) + 1] == value
    supervisor = line[line.index("python") :]
    assert supervisor[:4] == ["python", "-m", "launch.supervise", "--slurm"]
    for option, value in {"--nnodes": "2", "--nproc-per-node": "8", "--rdzv-id": "4711",
                          "--rdzv-endpoint": "127.0.0.1:24711"}.items():  # fmt: skip
        assert supervisor[supervisor.index(option) + 1] == value
    rest = ["pretrain/main.py", "--config", "configs/runs/quickstart.yaml", "run=/nowhere", "train.steps=7"]
    assert supervisor[supervisor.index("--") + 1 :] == rest
    assert asked(tmp_path) == []


@pytest.mark.parametrize("code", [75, 1, 2, 76, 77, 79, 137])
def test_requeues_what_was_preempted_and_nothing_else(code: int, tmp_path: Path, environment: dict[str, str]) -> None:
    done = slurm({**environment, "STEP_ENDS_WITH": str(code)})
    assert done.returncode == code
    assert asked(tmp_path) == (["requeue 4711"] if code == 75 else [])


def failures(run: Path, host: str, count: int = 3) -> Path:
    """A run in which a host was the first to fail so many times."""
    run.mkdir()
    rank = {"rank": 0, "local_rank": 0, "code": -9, "phase": None, "step": None, "message": ""}
    lines: list[dict[str, Any]] = [
        {"event": "end", "host": host, "started": 100.0 * n, "time": 100.0 * n + 50, "at_fault": [],
         "ranks": [{**rank, "time": 100.0 * n + 40}], "decision": "restart"}
        for n in range(count)
    ]  # fmt: skip
    (run / "supervise.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.mark.parametrize("late", [False, True])
def test_failing_hosts_are_excluded_from_the_next_start(
    late: bool, tmp_path: Path, environment: dict[str, str]
) -> None:
    run = failures(tmp_path / "run", "n7")
    environment |= {"STEP_ENDS_WITH": "75", "EXCLUDED": "n[1-2]", **({"LATE": "yes"} if late else {})}
    done = slurm(environment, "configs/runs/quickstart.yaml", f"run={run}")
    assert done.returncode == 75 and "without n7" in done.stdout
    update = "update JobId=4711 ExcNodeList=n[1-2],n7"
    assert asked(tmp_path) == ([update, "requeue 4711", update] if late else [update, "requeue 4711"])


def test_an_allocation_with_an_excluded_host_goes_back_once(tmp_path: Path, environment: dict[str, str]) -> None:
    run = failures(tmp_path / "run", "127.0.0.2")
    arguments = ("configs/runs/quickstart.yaml", f"run={run}")
    done = slurm(environment, *arguments)
    assert done.returncode == 75 and not (tmp_path / "srun").exists()
    assert asked(tmp_path) == ["update JobId=4711 ExcNodeList=127.0.0.2", "requeue 4711"]
    done = slurm({**environment, "SLURM_RESTART_COUNT": "1"}, *arguments)
    assert done.returncode == 1 and "127.0.0.2; submit it with --exclude" in done.stderr
    assert len(asked(tmp_path)) == 2 and not (tmp_path / "srun").exists()


def test_the_environment_of_the_hardware(tmp_path: Path, environment: dict[str, str]) -> None:
    def exported(more: dict[str, str], *arguments: str) -> dict[str, str]:
        done = slurm({**environment, **more}, *arguments, "configs/runs/quickstart.yaml", "run=/nowhere")
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "environment").read_text())  # type: ignore[no-any-return]

    there = exported({"NCCL_CROSS_NIC": "2"}, "--hardware", "configs/hardware/mi300x.yaml")
    assert there["HSA_NO_SCRATCH_RECLAIM"] == "1" and there["NCCL_MIN_NCHANNELS"] == "112"
    assert there["NCCL_CROSS_NIC"] == "2"  # what the user has set stays
    found = exported({"GPUS": "NVIDIA H200\nNVIDIA H200"})
    assert found["NCCL_IB_TIMEOUT"] == "22" and "HSA_NO_SCRATCH_RECLAIM" not in found
    assert "NCCL_IB_TIMEOUT" not in exported({"GPUS": "No devices were found"})


@pytest.mark.parametrize(
    ("changed", "arguments", "message"),
    [
        ({}, ("--ranks-per-node", "2"), "usage: sbatch"),
        ({}, ("--nonsense", "configs/runs/quickstart.yaml"), "usage: sbatch"),
        ({"SLURM_JOB_ID": ""}, ("configs/runs/quickstart.yaml",), "usage: sbatch"),
        ({"SLURM_GPUS_ON_NODE": ""}, ("configs/runs/quickstart.yaml",), "give --ranks-per-node N"),
        ({}, ("--hardware", "none.yaml", "configs/runs/quickstart.yaml"), "hardware = none.yaml: No such file"),
        ({}, ("none.yaml",), "No such file or directory: 'none.yaml'"),
        ({"SLURM_SUBMIT_DIR": "/tmp"}, ("configs/runs/quickstart.yaml",), "is not the root of the repository"),
    ],
)
def test_bad_usage(
    changed: dict[str, str], arguments: tuple[str, ...], message: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    done = slurm({**environment, **changed}, *arguments)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not (tmp_path / "srun").exists() and asked(tmp_path) == []
