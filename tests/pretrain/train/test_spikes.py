"""What counts as a spike, and the state that the answer depends on."""

from __future__ import annotations

import json
import math
import random

import pytest

from pretrain.train.faults.config import FaultsConfig
from pretrain.train.faults.spikes import spike
from pretrain.train.faults.state import FaultState

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
