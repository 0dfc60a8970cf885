"""How many iterations run, whose time counts, and when a signal ends it."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence

import pytest
import torch

from parallel.bench import overlap
from parallel.bench.interrupt import Interrupted, Stop
from parallel.bench.timing import BATCH_US, Clock, Control, Plan, host_clock, measure
from parallel.processes import Processes


class Others(Control):
    """Control of rank 0 in a job whose other ranks' stamps are given: stamps of the k-th batch come from `clocks`."""

    def __init__(self, *clocks: Clock):
        super().__init__(Processes(0, 1, 0, torch.device("cpu")), Stop())
        self.clocks = clocks
        self.batches: list[int] = []

    def maxima(self, values: Sequence[float]) -> list[float]:
        values = super().maxima(values)
        self.batches.append(len(values))
        stamps = [values, *(clock(len(values)) for clock in self.clocks)]
        return [max(column) for column in zip(*stamps)]


def steady(microseconds: float) -> Clock:
    return lambda iterations: [microseconds * (i + 1) for i in range(iterations)]


def test_a_fixed_number_of_iterations() -> None:
    control = Others()
    assert measure(steady(100), control, Plan(warmup=5, iterations=7)) == [100] * 7
    assert control.batches == [1, 4, 8]  # the first call, the rest of the warm-up, one to get into step and all at once


def test_batches_are_short_enough_to_be_broken_off() -> None:
    control = Others()
    slow = BATCH_US / 2.5
    assert len(measure(steady(slow), control, Plan(warmup=1, iterations=7))) == 7
    assert control.batches == [1, 3, 3, 3, 1]


def test_steady_times_need_the_fewest_iterations() -> None:
    assert len(measure(steady(100), Others(), Plan(least=20))) == 20


def test_noise_asks_for_more_and_the_most_ends_it() -> None:
    draw = random.Random(1)

    def noisy(iterations: int) -> list[float]:
        ends, now = [], 0.0
        for _ in range(iterations):
            now += draw.choice((50.0, 100.0))
            ends.append(now)
        return ends

    assert len(measure(noisy, Others(), Plan(confidence=0.001, most=300))) == 300
    assert 20 < len(measure(noisy, Others(), Plan(confidence=0.05, most=100_000))) < 1000


def test_seconds_end_it_after_three() -> None:
    assert len(measure(steady(4e6), Others(), Plan(seconds=5))) == 3
    assert len(measure(steady(1e6), Others(), Plan(seconds=5))) == 5


def test_an_iteration_is_over_when_the_last_rank_is() -> None:
    # Ends of rank 0: 10, 20, 30, ...; of rank 1: 15 later from the fourth on (the third that counts). The wait counts once.
    late: Clock = lambda n: [10.0 * (i + 1) + (15 if i >= 3 else 0) for i in range(n)]  # noqa: E731
    assert measure(steady(10), Others(late), Plan(warmup=0, iterations=5)) == [10, 10, 25, 10, 10]


def test_ranks_that_start_apart_are_not_timed_waiting() -> None:
    # Rank 1 starts 70 before rank 0 and waits for it in its first iteration.
    early: Clock = lambda n: [70 + 10.0 * (i + 1) for i in range(n)]  # noqa: E731
    assert measure(steady(10), Others(early), Plan(warmup=0, iterations=5)) == [10] * 5


def test_isolated_takes_the_longest_duration_of_each() -> None:
    mine: Clock = lambda n: [10.0, 30.0, 10.0][:n]  # noqa: E731
    theirs: Clock = lambda n: [20.0, 20.0, 20.0][:n]  # noqa: E731
    assert measure(mine, Others(theirs), Plan(warmup=0, iterations=3, isolated=True)) == [20, 30, 20]


def test_the_host_clock_counts_calls() -> None:
    calls = []
    ends = host_clock(lambda: calls.append(1))(6)
    assert len(calls) == 6
    assert len(ends) == 6
    assert sorted(ends) == ends
    meets = []
    durations = host_clock(lambda: calls.append(1), True, lambda: meets.append(1))(5)
    assert (len(durations), len(meets), len(calls)) == (5, 5, 11)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_measurement_between_batches(number: signal.Signals) -> None:
    done = []

    def clock(iterations: int) -> list[float]:
        done.append(iterations)
        if len(done) == 2:
            signal.raise_signal(number)
            signal.raise_signal(number)  # the same Ctrl-C, passed on by a launcher
        return [1e5 * (i + 1) for i in range(iterations)]

    before = signal.getsignal(number)
    with Stop() as stop, pytest.raises(Interrupted) as told:
        measure(clock, Control(Processes(0, 1, 0, torch.device("cpu")), stop), Plan(iterations=1000))
    assert told.value.number == number
    assert len(done) == 2
    assert signal.getsignal(number) == before


def test_only_what_ran_beside_the_other_counts() -> None:
    # Collectives end at 0, 10, ..., 100. Products at 33, 43, 50, 95: inside are collectives that end from 40 to 90.
    collectives = [10.0 * i for i in range(11)]
    products = [33.0, 43.0, 50.0, 95.0]
    assert overlap.inside(collectives, products) == 10
    assert overlap.inside([0, 10, 20, 60, 90], [5, 95]) == pytest.approx(80 / 3)
    assert overlap.inside(products, collectives) == pytest.approx(62 / 3)
    assert overlap.inside([0.0, 50.0], [10.0, 20.0]) is None
    assert overlap.inside([5.0], [0.0, 10.0]) is None


def test_hidden_share() -> None:
    assert overlap.hidden(1.0, 1.0) == 1
    assert overlap.hidden(2.0, 2.0) == 0
    assert overlap.hidden(1.25, 1.5) == 0.5
    assert overlap.hidden(5.0, 1.0) == 0
    assert overlap.hidden(0.97, 0.99) == 1
