"""What counts as a spike, and the state that the answer depends on."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.exit import Exit
from pretrain.train.faults.config import FaultsConfig
from pretrain.train.faults.events import Events
from pretrain.train.faults.guard import Guard
from pretrain.train.faults.spikes import spike
from pretrain.train.faults.state import FaultState
from pretrain.train.step import StepResult

CONFIG = FaultsConfig(window=9, history=5, loss_factor=6, loss_floor=0.001, norm_factor=10)
WINDOW = [[2.0 + 0.01 * k, 1.0] for k in (-2, -1, 0, 1, 2)]  # median 2, median absolute deviation 0.01


def test_the_bar_by_hand() -> None:
    bar = 2.0 + 6 * 1.4826 * 0.01
    assert spike(WINDOW, bar - 1e-6, 1.0, CONFIG) is None
    assert spike(WINDOW, bar + 1e-6, 1.0, CONFIG) == "the loss 2.089 is 6.0 deviations above 2"
    assert spike(WINDOW, 2.0, 9.999, CONFIG) is None
    assert spike(WINDOW, 2.0, 10.01, CONFIG) == "the gradient norm 10.01 is 10 times the usual 1"
    assert spike(WINDOW, 2.0, 1e9, CONFIG.model_copy(update={"norm_factor": None})) is None
    assert spike(WINDOW[:4], 100.0, 1e9, CONFIG) is None  # too short a history
    assert spike(WINDOW, 0.1, 0.001, CONFIG) is None  # nothing is wrong with a loss that falls


def test_losses_that_hardly_vary_have_a_floor() -> None:
    flat = [[2.0, 1.0]] * 5
    assert spike(flat, 2.0 + 6 * 0.002 - 1e-9, 1.0, CONFIG) is None
    assert spike(flat, 2.0 + 6 * 0.002 + 1e-6, 1.0, CONFIG) is not None
    assert spike([[0.0, 0.0]] * 5, 1.0, 1.0, CONFIG) is not None


def test_odd_steps_in_the_window_do_not_raise_the_bar() -> None:
    odd = [*WINDOW, [50.0, 70.0], [60.0, 80.0]]
    assert spike(odd, 2.5, 1.0, CONFIG) is not None and spike(odd, 2.0, 30.0, CONFIG) is not None


def test_no_false_alarm_in_ten_thousand_steps_and_every_spike_found() -> None:
    """A falling loss with the noise of small batches, gradient norms that vary by factors; then a rise by a quarter."""
    chance, state, config = random.Random(7), FaultState(), FaultsConfig()
    for step in range(10_000):
        loss = 2.0 + 9.0 / (1 + step / 50) ** 0.7 + chance.gauss(0, 0.03)
        norm = math.exp(chance.gauss(0, 0.35)) * (1 + 4 / (1 + step / 100))
        assert spike(state.window, loss, norm, config) is None, step
        state.add(loss, norm, config.window)
        if step % 100 == 99 and step > 1000:  # until then the loss falls so fast that a window is wide
            assert spike(state.window, 1.25 * loss, norm, config) is not None, step


def test_the_window_follows_and_survives_json() -> None:
    state = FaultState(bad=2, rollbacks=1, transient={"rank 1 on a": 1}, corrupted={"rank 2 on b": 40})
    for k in range(5):
        state.add(0.1 * k, 1 / 3, 3)
    state.add(math.nan, 1.0, 3)
    state.add(1.0, math.inf, 3)
    assert state.window == [[0.1 * k, 1 / 3] for k in (2, 3, 4)]
    assert FaultState.from_meta(json.loads(json.dumps(state.to_meta()))) == state
    assert FaultState.from_meta(None) == FaultState()
    back = state.returned_to(FaultState(window=[[1.0, 1.0]], bad=1))
    assert (back.window, back.bad, back.rollbacks, back.transient) == ([[1.0, 1.0]], 0, 1, {"rank 1 on a": 1})


def test_a_history_longer_than_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="history=64 is more than window=8; make it at most that"):
        FaultsConfig(window=8)


def guard(folder: Path, **settings: Any) -> tuple[Guard, FaultState, list[str]]:
    """A guard over WINDOW with its state, and the lines that it says."""
    config = CONFIG.model_copy(update={"spike": "skip", **settings})
    state, said = FaultState(window=[*WINDOW]), []
    run: Any = SimpleNamespace(
        config=SimpleNamespace(faults=config, train=SimpleNamespace(bad_steps=2)),
        engine=SimpleNamespace(watch=lambda: True),
        processes=SimpleNamespace(world=1),
        faults=state,
    )
    return Guard(run, Events(folder, True, said.append)), state, said


def result(judge: Guard, loss: float, norm: float, first: StepResult | None = None) -> StepResult:
    return StepResult(loss, norm, False, judge(loss, norm), first)


def test_a_loss_that_is_not_finite_is_refused_whatever_the_gradient(tmp_path: Path) -> None:
    judge, state, said = guard(tmp_path, spike="off")
    assert not judge.settle(7, result(judge, math.nan, 1.0)) and state.bad == 1
    assert said == ["step 7: the loss is not finite, update skipped (1 in a row)"]
    assert not judge.settle(8, result(judge, 500.0, 1.0)) and state.bad == 0
    judge, state, _ = guard(tmp_path, not_finite="rollback", rollbacks=1)
    assert judge.settle(7, result(judge, 1.0, math.inf)) and state.window == WINDOW
    state.rollbacks = 1
    with pytest.raises(Exit, match="step 7: the gradient is not finite, after 1 rollbacks") as caught:
        judge.settle(7, result(judge, 1.0, math.inf))
    assert caught.value.exit_code == 79


def test_a_replay_just_below_the_bar_blames_nobody(tmp_path: Path) -> None:
    bar = 2.0 + 6 * 1.4826 * 0.01
    for loss, event, blamed in ((bar - 1e-6, "unsteady", 0), (2.0, "transient", 1)):
        judge, state, _ = guard(tmp_path)
        first = result(judge, bar + 1e-6, 1.0)
        assert first.fault is not None and not first.updated
        second = StepResult(loss, 1.0, False, judge(loss, 1.0), first, changed=(0,))
        assert second.updated and not judge.settle(9, second)
        lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
        assert lines[-1]["event"] == event and sum(state.transient.values()) == blamed
        assert state.window[-1] == [loss, 1.0]


def test_events_are_added_after_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"step": 3, "ev')
    Events(tmp_path, True, print).add(4, "skip", "words", loss=math.nan)
    torn, line = (tmp_path / "events.jsonl").read_text().splitlines()
    assert torn == '{"step": 3, "ev'
    assert {key: value for key, value in json.loads(line).items() if key != "time"} == {
        "step": 4,
        "event": "skip",
        "text": "words",
        "loss": None,
    }
    Events(tmp_path, False, print).add(5, "skip", "another rank's")
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 2
