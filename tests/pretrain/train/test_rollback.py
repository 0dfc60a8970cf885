"""Back to a checkpoint and past the data: which sequences a run sees, and that it then equals one that never had the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.data import opening
from pretrain.data.loader import Loader
from pretrain.data.store import Corpus
from pretrain.train.callback import Callback, Run
from tests.pretrain.train.fault_runs import (
    SPIKES,
    Damage,
    Seen,
    curve,
    different,
    events,
    go,
    job,
    kinds,
    meta,
    state,
)
from tests.pretrain.train.small_run import records
from tests.ranks import TRAINING, run_ranks

ROLLBACK = (*SPIKES, "faults.spike=rollback", "faults.rewind=2", "checkpoint.every=2", "train.steps=8")
BATCH = 4


def first_tokens(corpus: Path, sequences: int) -> list[tuple[int, ...]]:
    """The first tokens of every sequence of the order."""
    whole = Loader(Corpus.open(corpus), sequence_length=32, global_batch=1, micro_batch=1, seed=0)
    return [tuple(whole.batches(i)[0].tokens.flatten()[:8].tolist()) for i in range(sequences)]


class BadData(Callback):
    """The loss is ten times too large on a certain sequence, whenever it comes, on whatever rank."""

    def __init__(self, tokens: tuple[int, ...]):
        self.tokens = tokens

    def on_start(self, run: Run) -> None:
        def scaled(module: Any, inputs: Any, output: Any) -> Any:
            return output * 20 if tuple(inputs[0].flatten()[:8].tolist()) == self.tokens else output

        run.model.register_forward_hook(scaled)


class Without(Loader):
    """A loader whose data never had the sequences 16 to 23."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.skipped = [(16, 24)]


def never_had_them(rank: int, world: int, *arguments: Any) -> Any:
    opening.Loader = Without  # type: ignore[misc]
    return job(rank, world, *arguments)


@pytest.mark.parametrize(
    ("overrides", "stop"), [((), 6), (("engine.kind=deepspeed",), None)], ids=["fsdp2, restarted", "zero2"]
)
def test_a_rollback_equals_a_run_that_never_had_the_data(
    overrides: tuple[str, ...], stop: int | None, corpus: Path, tmp_path: Path
) -> None:
    """Sequence 21 spoils step 6. The checkpoint of step 4 is two steps older; steps 5 and 6 had sequences 16 to 23."""
    numbers = {tokens: i for i, tokens in enumerate(first_tokens(corpus, 48))}
    bad = next(tokens for tokens, i in numbers.items() if i == 21)
    run, clean = tmp_path / "run", tmp_path / "clean"
    answer, *seen = go(2, run, corpus, *ROLLBACK, *overrides, callbacks=[BadData(bad), Seen()], stop=stop)
    if stop is not None:  # between the rollback and the end
        assert answer == 75
        answer, *more = go(2, run, corpus, *ROLLBACK, *overrides, callbacks=[BadData(bad), Seen()])
        seen += more
    assert answer == 0
    replayed = list(range(20, 24))
    assert sorted(numbers[tokens] for rank in seen for tokens in rank) == sorted(
        [*range(24), *replayed, *range(24, 40)]
    )
    assert kinds(run) == [(6, "persistent"), (6, "rollback")]
    event = events(run)[1]
    assert (event["origin"], event["to"], event["skipped"]) == (6, 4, [[16, 24]])
    assert [record["step"] for record in records(run)] == list(range(1, 9))
    assert meta(run, 8)["data"]["skipped"] == [[16, 24]] and meta(run, 8)["data"]["sequences"] == 32
    assert meta(run, 8)["faults"]["rollbacks"] == 1 and meta(run, 8)["tokens"] == 8 * BATCH * 32
    arguments = (clean, corpus, (*ROLLBACK, *overrides), [])
    assert run_ranks(never_had_them, 2, *arguments, preload=TRAINING) == [(0, None)] * 2
    assert curve(run) == curve(clean) and different(state(run, 8), state(clean, 8)) == []
    assert meta(run, 8)["faults"]["window"] == meta(clean, 8)["faults"]["window"]


def test_two_rollbacks_and_then_the_end(corpus: Path, tmp_path: Path) -> None:
    """Steps 5 and on are spoilt whatever the data: 3 to 5, then 3 to 5 of what is left, and then no more."""
    damage = [Damage("loss", "scale", set(range(5, 20))), Seen()]
    answer, seen = go(1, tmp_path, corpus, *ROLLBACK, "faults.rollbacks=2", callbacks=damage)
    assert answer.startswith("79: step 5: the loss ") and "after 2 rollbacks" in answer
    rolled = [event for event in events(tmp_path) if event["event"] == "rollback"]
    assert [(event["step"], event["to"], event["skipped"]) for event in rolled] == [
        (5, 2, [[8, 20]]),
        (5, 2, [[8, 32]]),
    ]
    numbers = {tokens: i for i, tokens in enumerate(first_tokens(corpus, 48))}
    # Each fifth step is computed twice before it is given up.
    expected = [*range(20), *range(16, 20), *range(20, 32), *range(28, 32), *range(32, 44), *range(40, 44)]
    assert [numbers[tokens] for tokens in seen] == expected
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]
    assert meta(tmp_path, 2)["data"]["skipped"] == [[8, 32]] and meta(tmp_path, 2)["faults"]["rollbacks"] == 2


def test_without_an_old_enough_checkpoint_the_step_is_skipped(corpus: Path, tmp_path: Path) -> None:
    damage = [Damage("loss", "scale", {5})]
    assert go(1, tmp_path, corpus, *ROLLBACK, "faults.rewind=5", "train.steps=6", callbacks=damage)[0] == 0
    assert kinds(tmp_path) == [(5, "persistent"), (5, "no rollback"), (5, "skip")]
    assert "skipped" in records(tmp_path)[4] and meta(tmp_path, 6)["data"]["skipped"] == []


def test_validation_lines_of_undone_steps_are_dropped(corpus: Path, tmp_path: Path) -> None:
    damage = [Damage("loss", "scale", {6}, times=8)]
    overrides = (*ROLLBACK, "train.steps=6", "validation.every=5", "validation.sequences=2", "log.tensorboard=true")
    assert go(1, tmp_path, corpus, *overrides, callbacks=damage)[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5] and kinds(tmp_path)[-1] == (6, "rollback")
    # The checkpoint that it went back to was saved anew at once: a job that dies here goes on like this one.
    assert meta(tmp_path, 4)["faults"]["rollbacks"] == 1 and meta(tmp_path, 4)["data"]["skipped"] == [[16, 24]]
