"""One training job over two nodes, started by torchrun, by deepspeed and by launch/slurm.sh: the job that one node would do.

The nodes are this machine twice, by two of its addresses. The commands that reach other machines (ssh, pdsh, srun) are stand-ins
that run what they are given right here, and say in the environment which node it is.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch.stand_ins import JOB_OF_SLURM, install
from tests.launch.supervised import family, journal, running, until
from tests.pretrain.train.small_run import SETTINGS, losses, train_on_rank
from tests.ranks import QUIET, ROOT, TRAINING, free_port, run_ranks

MAIN = ["pretrain/main.py", "--config", "configs/runs/quickstart.yaml", *SETTINGS]
JOB = ("train.steps=2", "train.precision=fp32", "mesh.ep=2")
TENSOR = (*JOB, "mesh.tp=2")
ZERO = (*JOB, "engine.kind=deepspeed")
NODES = ("127.0.0.1", "127.0.0.2")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a node: stand-ins first on the path; every Python that has a rank notes it under the node's name."""
    environment = {**os.environ, **QUIET, "GLOO_SOCKET_IFNAME": "lo", "PLACES": str(tmp_path / "places")}
    return install(tmp_path, environment)


def places(tmp_path: Path) -> dict[str, list[int]]:
    """The ranks that ran on each node."""
    found: dict[str, list[int]] = {}
    for note in sorted((tmp_path / "places").iterdir()):
        node, _, rank = note.name.rpartition("-")
        found.setdefault(node, []).append(int(rank))
    return found


def on_one_node(run: Path, corpus: Path, overrides: tuple[str, ...], world: int = 4) -> list[float]:
    run_ranks(train_on_rank, world, run, corpus, overrides, preload=TRAINING)
    return losses(run)


def test_torchrun_on_two_nodes(corpus: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    torchrun = ["torchrun", "--nnodes", "2", "--nproc-per-node", "2", "--rdzv-id", "two", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", f"{NODES[0]}:{free_port()}"]
    agents = [
        subprocess.Popen(
            [*torchrun, "--local-addr", node, *MAIN, *TENSOR, f"run={tmp_path / 'run'}", f"data.path={corpus}"],
            cwd=ROOT,
            env={**environment, "NODE": node},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in NODES
    ]
    try:
        said = [agent.communicate(timeout=500)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # asked politely, it ends its workers
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)[-3000:]
    assert sorted(places(tmp_path).values()) == [[0, 1], [2, 3]]  # which node comes first is torchrun's choice
    # Neighbours in tp and in ep are on one node.
    (picture,) = (text for text in said if "groups of rank 0" in text)
    assert "dp 2 x tp 2 = 4 rank(s) on cpu; experts: edp 2 x ep 2" in picture
    assert "dp 0     0     1  node 0\n  dp 1     2     3  node 1\n" in picture
    assert "  tp   0, 1\n  ep   0, 1\n" in picture
    assert losses(tmp_path / "run") == on_one_node(tmp_path / "one", corpus, TENSOR)


def test_deepspeed_on_two_nodes(corpus: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "hostfile").write_text("".join(f"{node} slots=2\n" for node in NODES))
    deepspeed = ["deepspeed", "--hostfile", str(tmp_path / "hostfile"), "--master_port", str(free_port())]
    done = call([*deepspeed, *MAIN, *ZERO, f"run={tmp_path / 'run'}", f"data.path={corpus}"], environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert places(tmp_path) == {NODES[0]: [0, 1], NODES[1]: [2, 3]}
    assert "dp 4 = 4 rank(s) on cpu; experts: edp 2 x ep 2" in done.stdout
    assert losses(tmp_path / "run") == on_one_node(tmp_path / "one", corpus, ZERO)


def test_slurm_on_two_nodes_saves_once_before_the_time_limit(
    corpus: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """A supervisor and a torchrun on each node; Slurm's signal ends in one checkpoint, exit code 75 and the queue."""
    run, precision = tmp_path / "run", "train.precision=fp32"
    endless = ("train.steps=100000", "checkpoint.every=100000", precision)
    arguments = ["--ranks-per-node", "1", "configs/runs/quickstart.yaml", *SETTINGS, *endless]
    process = subprocess.Popen(
        ["bash", str(ROOT / "launch/slurm.sh"), *arguments, f"data.path={corpus}", f"run={run}"],
        env={**environment, **JOB_OF_SLURM}, cwd="/", text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    with running(process):
        until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) >= 2, process, 120)
        supervisors = [each for each in family(process.pid) if each.cmdline()[1:3] == ["-m", "launch.supervise"]]
        assert len(supervisors) == 2
        for each in supervisors:  # or the first could end the job, and with it the second, before that one is told
            each.suspend()
        for each in supervisors:
            each.send_signal(signal.SIGUSR1)
        for each in supervisors:
            each.resume()
        said = process.communicate(timeout=120)[0]
    assert process.returncode == 75, said[-3000:]
    assert "dp 2 = 2 rank(s)" in said and "back into the queue" in said
    assert sorted(places(tmp_path).values()) == [[0], [1]]
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "requeue 4711"
    done = len(losses(run))
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == [f"step_{done:08d}"]
    ends = journal(run, "end")
    assert [(end["code"], end["why"]) for end in ends] == [(75, "stopped by SIGUSR1")] * 2
    assert sorted(end["host"] for end in ends) == list(NODES)
    run_ranks(train_on_rank, 2, tmp_path / "one", corpus, endless, done, preload=TRAINING)
    assert losses(run) == losses(tmp_path / "one")


def call(command: list[str], environment: dict[str, str], cwd: str | Path = ROOT) -> subprocess.CompletedProcess[str]:
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
    return subprocess.CompletedProcess(command, process.returncode, out, err)
