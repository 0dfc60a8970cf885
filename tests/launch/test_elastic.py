"""A real training job that loses a host and gets it back: two ranks, one, two again, with the same global batch all along."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from pretrain.config import ConfigError
from pretrain.train import layout
from tests.launch.supervised import begin, family, gone, journal, running, until
from tests.pretrain.train.small_run import SETTINGS, configuration, losses, train_on_rank
from tests.ranks import ROOT, TRAINING, free_port, run_ranks

# In every rank: a step begins when the file GATE allows it for this number of ranks, or when the rank has been asked to leave.
GATE = """
import json, os, signal, time

if "WORLD_SIZE" in os.environ and "GATE" in os.environ:
    from pretrain.train import heartbeat

    asked = []

    def observer(name, step):
        if name != "step":
            return
        if not asked:
            before = signal.getsignal(signal.SIGTERM)
            asked.append(0)
            signal.signal(signal.SIGTERM, lambda number, frame: (asked.append(number), before(number, frame)))
        while len(asked) == 1 and step > json.load(open(os.environ["GATE"]))[os.environ["WORLD_SIZE"]]:
            time.sleep(0.02)

    heartbeat.observer = observer
"""


def allow(gate: Path, **steps: int) -> None:
    """one=3: a job of one rank may go on until after step 3."""
    fresh = gate.with_suffix(".fresh")
    fresh.write_text(json.dumps({"1": steps["one"], "2": steps["two"]}))
    fresh.replace(gate)


def test_two_ranks_one_two_with_the_same_batches(corpus: Path, tmp_path: Path) -> None:
    run, gate, settings = (
        tmp_path / "run",
        tmp_path / "gate.json",
        ("train.precision=fp32", "checkpoint.every=1", "train.steps=8"),
    )
    (tmp_path / "sitecustomize.py").write_text(GATE)
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "GATE": str(gate), "GLOO_SOCKET_IFNAME": "lo"}
    command = ("pretrain/main.py", "--config", "configs/runs/quickstart.yaml", *SETTINGS, *settings,
               f"run={run}", f"data.path={corpus}")  # fmt: skip
    endpoint = f"127.0.0.1:{free_port()}"

    def host(name: str) -> object:
        options = ["--nnodes", "1:2", "--rdzv-endpoint", endpoint, "--rdzv-conf", "last_call_timeout=5", "--host", name]
        return begin(run, *options, "--local-addr", name, real=True, command=command, environment=environment)

    def done() -> int:
        return len(losses(run)) if (run / "metrics.jsonl").exists() else 0

    allow(gate, one=0, two=2)
    with running(host("127.0.0.1")) as first:  # it holds the meeting place
        with running(host("127.0.0.2")) as second:
            until(lambda: done() == 2, first, 120)
            lost = [second, *family(second.pid)]
            for process in lost:
                with contextlib.suppress(ProcessLookupError):  # some end with those above them
                    os.kill(process.pid, signal.SIGKILL)
            assert gone(lost[1:])
        allow(gate, one=3, two=3)  # the other rank finds itself alone, and its supervisor starts it again, alone
        until(lambda: done() == 3, first, 120)
        # Should the host that returns be too slow to meet the other, that one makes another step and both try again.
        allow(gate, one=3, two=8)
        with running(host("127.0.0.2")) as again:
            said = [process.communicate(timeout=180)[0] for process in (first, again)]
    print("\n".join(said))
    assert [first.returncode, again.returncode] == [0, 0]
    ends = journal(run, "end")
    assert [(end["host"], end["code"], end["decision"]) for end in ends[:1]] == [("127.0.0.1", 1, "restart")]
    # A launch that the returning host was too slow for may have ended between: with another start.
    assert all(end["decision"] == "restart" for end in ends[1:] if end["code"])
    assert {(end["host"], end["code"]) for end in ends[1:] if not end["code"]} == {("127.0.0.1", 0), ("127.0.0.2", 0)}
    assert json.loads((run / "checkpoints/step_00000008/meta.json").read_text())["world"] == 2
    # The bound of a change of ranks in the middle: tests/pretrain/train/test_resume.py.
    run_ranks(train_on_rank, 1, tmp_path / "alone", corpus, settings, preload=TRAINING)
    torch.testing.assert_close(losses(run), losses(tmp_path / "alone"), rtol=2e-5, atol=0)


def test_a_number_of_ranks_that_does_not_divide_the_batch(corpus: Path, tmp_path: Path) -> None:
    """Exit code 2, which ends a supervised job on every host; see the tests of layouts for more of these."""
    with pytest.raises(ConfigError, match=r"train.batch = 4: not a multiple of 3 data-parallel rank\(s\)") as caught:
        layout.check(configuration(tmp_path, corpus), 3)
    assert str(caught.value).endswith(
        "use train.batch=3 or 6, or another train.micro_batch, or 1, 2 or 4 data-parallel rank(s)"
    )
