"""Two ranks, each in a network of its own, and a cable between them that is pulled: run as `unshare -Urn python partition.py`.

Arguments: the run folder, the corpus. Prints one line of JSON: how the ranks ended, what they said, and how the next start went.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.pretrain.train.small_run import SETTINGS
from tests.ranks import ROOT

STEPS = 20
CUT = 12  # the step after which the cable is pulled: both ranks are held before the next one, and step 10 is saved


class Cable:
    """Two networks on one machine and the pair of devices that joins them."""

    def __enter__(self) -> Cable:
        self.far = subprocess.Popen(["unshare", "-n", "sleep", "1000"])  # the other network lives as long as this
        ours, theirs = Path("/proc/self/ns/net"), Path(f"/proc/{self.far.pid}/ns/net")
        while theirs.readlink() == ours.readlink():
            time.sleep(0.01)
        self.there = ["nsenter", "-t", str(self.far.pid), "-n"]
        ip("link", "add", "near0", "type", "veth", "peer", "name", "far0")
        ip("link", "set", "far0", "netns", str(self.far.pid))
        for name, address, where in (("near0", "10.9.0.1/24", []), ("far0", "10.9.0.2/24", self.there)):
            ip("addr", "add", address, "dev", name, where=where)
            ip("link", "set", name, "up", where=where)
            ip("link", "set", "lo", "up", where=where)
        return self

    def __exit__(self, *arguments: object) -> None:
        self.far.kill()
        self.far.wait()

    def set(self, state: str) -> None:
        ip("link", "set", "near0", state)

    def ranks(self, run: Path, corpus: Path, port: int) -> list[subprocess.Popen[str]]:
        command = [sys.executable, "tests/pretrain/watch/plan.py", str(run.parent), f"step:{CUT + 1}::hold", "--"]
        command += ["--config", "configs/runs/quickstart.yaml", *SETTINGS]
        command += [f"run={run}", f"data.path={corpus}", f"train.steps={STEPS}", "checkpoint.every=10"]
        command += ["train.timeout=8", "log.every=1"]
        started = []
        for rank, (device, where) in enumerate((("near0", []), ("far0", self.there))):
            settings: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}
            settings |= {"MASTER_ADDR": "10.9.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": device}
            settings |= {"OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT}
            environment = {**os.environ, **{key: str(value) for key, value in settings.items()}}
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started.append(subprocess.Popen([*where, *command], env=environment, **pipes))
        return started


def ip(*arguments: str, where: list[str] | None = None) -> None:
    subprocess.run([*(where or []), "ip", *arguments], check=True)


def ended(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    said = [rank.communicate(timeout=200)[0] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]


def main(run: Path, corpus: Path) -> None:
    with Cable() as cable:
        ranks = cable.ranks(run, corpus, 29501)
        there = [run.parent / f"at-step-{CUT + 1}-{rank}" for rank in (0, 1)]
        while not all(path.exists() for path in (*there, run / "checkpoints/step_00000010")):
            assert all(rank.poll() is None for rank in ranks), ended(ranks)
            time.sleep(0.02)
        cable.set("down")
        (run.parent / "release").touch()
        first = ended(ranks)
        cable.set("up")
        again = ended(cable.ranks(run, corpus, 29502))
    print(json.dumps({"first": first, "again": again}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
