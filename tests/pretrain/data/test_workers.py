"""Processes that read ahead: the same batches for any number of them, also when they are killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.data import Batch, Corpus, DataError, Loader
from pretrain.data.stages import Stage
from pretrain.data.workers import Read, Workers
from tests.pretrain.data.test_stream import rows

T = 32
STAGES = [Stage(0, 8, 2, T), Stage(2 * 8 * T, 16, 2, T), Stage(2 * 8 * T + 16 * T, 8, 1, 2 * T, run=1)]


def reader(kind: str) -> Read:
    """Stands for a loader: a step's number, and the state's, as a batch."""

    def read(state: dict[str, Any], step: int) -> list[Batch]:
        if kind == "mortal" and step == 5:
            os._exit(9)
        if step == 7:
            raise DataError("file: token 99 at byte 3")
        values = torch.tensor([[step, state["number"]]])
        return [Batch(values, values + 1, torch.tensor([0, 2], dtype=torch.int32), padding=step)]

    return read


@pytest.fixture
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    kind, count = request.param
    made = Workers(partial(reader, kind), count)
    yield made
    made.close()


@pytest.mark.parametrize("workers", [("sound", 2)], indirect=True)
def test_steps_come_in_the_order_in_which_they_are_asked_for(workers: Workers) -> None:
    for number, steps in ((1, range(7)), (2, range(3, 7)), (2, (20, 11, 12))):
        for step in steps:
            (batch,) = workers.read(step, {"number": number})
            assert batch.tokens.tolist() == [[step, number]] and batch.targets.tolist() == [[step + 1, number + 1]]
            assert batch.cu_seqlens.tolist() == [0, 2] and batch.padding == step
    with pytest.raises(DataError, match="token 99 at byte 3"):
        workers.read(7, {"number": 1})
    assert workers.read(8, {"number": 1})[0].tokens.tolist() == [[8, 1]]


@pytest.mark.parametrize("workers", [("mortal", 1)], indirect=True)
def test_what_kills_every_worker_ends_it(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.data.workers.DEATHS", 1)
    for step in range(3):
        workers.read(step, {"number": 0})
    with pytest.raises(RuntimeError, match=r"\(exit code 9\), 1 in a row.*data.workers=0"):
        for step in range(3, 6):
            workers.read(step, {"number": 0})


def test_a_killed_worker_changes_nothing(prepared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    corpus = Corpus.open(prepared)
    given: dict[str, Any] = {"stages": STAGES, "seed": 5, "rank": 1, "ranks": 2}
    alone = Loader(corpus, **given)
    lengths = [T] * 3 + [2 * T] * 6
    expected = [rows(alone.batches(step), length) for step, length in enumerate(lengths)]
    with_two = Loader(corpus, **given, workers=2)
    assert with_two._workers is not None
    pids = with_two._workers.pids
    for step in range(9):
        if step == 1:  # with steps on their way
            os.kill(with_two._workers.pids[step % 2], signal.SIGKILL)
            with_two._workers._workers[step % 2].process.join()
        elif step == 2:
            os.kill(with_two._workers.pids[0], signal.SIGTERM)  # as to a whole job: it goes on
        assert torch.equal(rows(with_two.batches(step), lengths[step]), expected[step])
        assert with_two.state_dict()["step"] == step + 1
    assert with_two._workers.pids[0] == pids[0] and with_two._workers.pids[1] != pids[1]
    assert capfd.readouterr().err.count("another one reads steps") == 1
    state = {**alone.state_dict(), **Loader(corpus, **given).state_dict()}
    with_two.load_state_dict(state)  # back to the beginning, but for one sequence
    alone.load_state_dict(state)
    for one in (alone, with_two):
        one.skip_to({(0, 0): 1})
    assert torch.equal(rows(with_two.batches(0), T), rows(alone.batches(0), T))
    assert not torch.equal(rows(alone.batches(0), T), expected[0])
    last = with_two._workers
    with_two.close()
    assert not any(worker.process.is_alive() for worker in last._workers)
