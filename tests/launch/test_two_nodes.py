"""One training job over two nodes, started by torchrun, by deepspeed and by srun: the job that one node would do.

The nodes are this machine twice, by two of its addresses. The commands that reach other machines (ssh, pdsh, srun) are stand-ins
that run what they are given right here, and say in the environment which node it is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch.stand_ins import install
from tests.pretrain.train.small_run import SETTINGS, losses, train_on_rank
from tests.ranks import QUIET, ROOT, free_port, run_ranks

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
    preload = ("deepspeed", "megatron.core.datasets.indexed_dataset")
    run_ranks(train_on_rank, world, run, corpus, overrides, preload=preload)
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
        said = [agent.communicate(timeout=200)[0] for agent in agents]
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


def test_slurm_on_two_nodes(corpus: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    settings = [*SETTINGS, "train.steps=1", "train.precision=fp32", f"data.path={corpus}"]
    done = slurm(["configs/runs/quickstart.yaml", *settings, f"run={tmp_path / 'run'}"], environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert places(tmp_path) == {NODES[0]: [0], NODES[1]: [1]}
    assert "dp 2 = 2 rank(s)" in done.stdout
    assert losses(tmp_path / "run") == on_one_node(
        tmp_path / "one", corpus, ("train.steps=1", "train.precision=fp32"), 2
    )
    asked = json.loads((tmp_path / "srun").read_text())
    assert "--distribution=block" in asked  # ranks of a node are neighbours
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("code", [75, 2, 137])
def test_slurm_requeues_what_was_preempted_and_nothing_else(
    code: int, tmp_path: Path, environment: dict[str, str]
) -> None:
    done = slurm(["configs/runs/quickstart.yaml"], {**environment, "STEP_ENDS_WITH": str(code)})
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == (code == 75)
    if code == 75:
        assert (tmp_path / "requeued").read_text() == "4711"


def test_slurm_without_arguments_says_how(environment: dict[str, str]) -> None:
    done = slurm([], environment)
    assert done.returncode == 2 and "usage: sbatch" in done.stderr


def slurm(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "[two nodes]",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_TASKS_PER_NODE": "1(x2)",
    }
    return call(["bash", str(ROOT / "launch/slurm.sh"), *arguments], {**environment, **job}, cwd="/")


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
        out, err = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
    return subprocess.CompletedProcess(command, process.returncode, out, err)
