"""Self time by phase and module, from events made by hand: the answers are sums that one can do in the head."""

from __future__ import annotations

import pytest

from pretrain.profiling.attribution import MODULE, NODE, Event, Intervals, attribute


def span(name: str, start: float, end: float, sequence: int = -1, thread: int = 1) -> Event:
    return Event(name, start, end, thread, sequence, operation=not name.startswith("braid: "))


STEP = [
    span("braid: data", 0, 1),
    span("braid: forward", 2, 10),
    span(MODULE + "blocks.0", 3, 9),
    span(MODULE + "blocks.0.ffn", 4, 8),
    span("aten::mm", 5, 7, sequence=11),
    span("aten::add", 8.25, 8.75, sequence=12),
    span("braid: backward", 10, 20),
    span(NODE + "AddBackward0", 11, 12, sequence=12),
    span(NODE + "MmBackward0", 12, 16, sequence=11),
    span("aten::mm", 13, 15),
    span("braid: optimizer", 20, 24),
    span("braid: checkpoint", 24, 25),
    span("aten::mm", 26, 27),  # after the last named range
]


def test_every_moment_belongs_to_one_phase() -> None:
    spent = attribute(STEP, 1)
    assert dict(spent.phases) == pytest.approx(
        {"data": 1, "other": 1, "forward": 8, "backward": 10, "optimizer": 4, "checkpoint": 1, "collectives": 0}
    )
    assert spent.seconds == 25 and spent.steps == 1
    assert sum(spent.phases.values()) == pytest.approx(spent.seconds)


def test_modules_have_their_own_forward_and_backward() -> None:
    spent = attribute(STEP, 1)
    assert spent.modules["blocks.0"] == {"forward": 2, "recomputed": 0, "backward": 1}
    assert spent.modules["blocks.0.ffn"] == {"forward": 4, "recomputed": 0, "backward": 4}
    assert spent.modules[""] == {"forward": 2, "recomputed": 0, "backward": 5}
    assert spent.operations == {"aten::mm": 4, "aten::add": 0.5, "AddBackward0": 1, "MmBackward0": 2}


def test_a_forward_pass_within_the_backward_pass_is_recomputed() -> None:
    again = [
        *STEP[:6],
        span("braid: backward", 10, 20),
        span(NODE + "AddBackward0", 11, 19, sequence=12),
        span(MODULE + "blocks.0.ffn", 12, 15),
        span("aten::mm", 13, 14, sequence=31),
        span(NODE + "MmBackward0", 16, 18, sequence=31),
    ]
    spent = attribute(again, 1)
    assert spent.modules["blocks.0.ffn"] == {"forward": 4, "recomputed": 3, "backward": 2}
    assert spent.modules["blocks.0"] == {"forward": 2, "recomputed": 0, "backward": 3}


def test_waits_for_others_are_collectives() -> None:
    waits = [
        *STEP,
        span(
            "gloo:all_reduce", 2.5, 6, thread=7
        ),  # under way: 0.5 s of it under no operation before blocks.0, 2 s in blocks
        span("FSDP::all_gather (blocks.0)", 20.5, 21),
        span("aten::copy_", 20.6, 20.8),
    ]
    spent = attribute(waits, 1)
    # Python stands still in [2.5, 5]; the product runs on while the rest is on its way.
    assert spent.phases["collectives"] == pytest.approx(2.5 + 0.5)
    assert spent.phases["forward"] == pytest.approx(5.5) and spent.phases["optimizer"] == pytest.approx(3.5)
    assert spent.modules["blocks.0.ffn"]["forward"] == pytest.approx(3)
    assert sum(spent.phases.values()) == pytest.approx(25)


def test_the_backward_pass_of_a_gpu_runs_on_a_thread_of_its_own() -> None:
    events = [event for event in STEP if not event.name.startswith(NODE) and event.start != 13]
    events += [span(NODE + "MmBackward0", 12, 16, sequence=11, thread=9), span("aten::mm", 13, 15, thread=9)]
    spent = attribute(events, 1)
    assert spent.modules["blocks.0.ffn"]["backward"] == 4
    assert spent.phases["backward"] == 10 and sum(spent.phases.values()) == pytest.approx(25)


def test_no_named_range_no_time() -> None:
    spent = attribute([span("aten::mm", 0, 1)], 1)
    assert spent.seconds == 0 and not spent.phases


def test_intervals() -> None:
    pieces = Intervals([(4, 5), (0, 2), (1, 3)])
    assert [pieces.within(*ends) for ends in ((0, 9), (2.5, 4.5), (3, 4), (-1, 0.5), (6, 7))] == [4, 1, 0, 0.5, 0]
