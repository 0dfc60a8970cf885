"""Steps whose numbers are wrong: one decision by all ranks before the update, the same after a restart, and replays."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pretrain.train.fault_runs import (
    SPIKES,
    Damage,
    Noise,
    curve,
    different,
    events,
    go,
    kinds,
    meta,
    state,
)
from tests.pretrain.train.small_run import records

NOT_FINITE = {
    "gradient, fsdp2": (2, ("gradient", "nan"), ()),
    "gradient, replicas": (2, ("gradient", "inf"), ("mesh.replicate=2",)),
    "loss, context": (2, ("loss", "nan"), ("mesh.cp=2",)),
    "batch, hybrid": (4, ("batch", "inf"), ("mesh.replicate=2",)),
    "router, experts": (2, ("router", "nan"), ("mesh.ep=2",)),
    "gradient, tensor": (2, ("gradient", "nan"), ("mesh.tp=2",)),
    "gradient, pipeline": (2, ("gradient", "nan"), ("mesh.pp=2",)),
    "loss, zero1": (2, ("loss", "inf"), ("engine.kind=deepspeed", "engine.stage=1")),
    "gradient, zero3": (2, ("gradient", "nan"), ("engine.kind=deepspeed", "engine.stage=3", "engine.keep_whole=0")),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_a_number_that_is_not_finite_on_one_rank_stops_the_update_on_all(
    case: str, corpus: Path, tmp_path: Path
) -> None:
    """Parameters, optimizer state, its step counts and the routers' biases are bit for bit what they were."""
    world, (where, how), overrides = NOT_FINITE[case]
    damage = Damage(where, how, {3}, rank=world - 1)
    assert go(world, tmp_path, corpus, "train.steps=4", *overrides, callbacks=[damage])[0] == 0
    assert kinds(tmp_path) == [(3, "persistent"), (3, "skip")]
    assert [("skipped" in record) for record in records(tmp_path)] == [False, False, True, False]
    two, three, four = (state(tmp_path, step, ("model", "optimizer")) for step in (2, 3, 4))
    assert different(two, three) == []
    assert {"model/norm.weight", "optimizer/norm.weight/exp_avg", "model/blocks.0.ffn.router.bias"} <= set(
        different(three, four)
    )
    assert [meta(tmp_path, step)["faults"]["bad"] for step in (2, 3, 4)] == [0, 1, 0]
    assert len(meta(tmp_path, 4)["faults"]["window"]) == 3


ZERO = "engine.kind=deepspeed"
SPIKE = {"one rank": (1, ()), "fsdp2": (2, ()), "zero2": (2, (ZERO,)), "zero3": (2, (ZERO, "engine.stage=3"))}


@pytest.mark.parametrize("case", SPIKE)
def test_a_spike_is_skipped(case: str, corpus: Path, tmp_path: Path) -> None:
    world, overrides = SPIKE[case]
    overrides = ("train.steps=6", *SPIKES, "faults.spike=skip", *overrides)
    assert go(world, tmp_path, corpus, *overrides, callbacks=[Damage("loss", "scale", {5})])[0] == 0
    assert kinds(tmp_path) == [(5, "persistent"), (5, "skip")]
    losses = [loss for _, loss, _ in curve(tmp_path)]
    assert losses[4] > 9 * losses[3] and records(tmp_path)[4]["skipped"] is True
    assert events(tmp_path)[1]["loss"] == losses[4] and "deviations above" in events(tmp_path)[1]["text"]
    four, five, six = (state(tmp_path, step, ("model", "optimizer")) for step in (4, 5, 6))
    assert different(four, five) == [] and "model/norm.weight" in different(five, six)
    assert [pair[0] for pair in meta(tmp_path, 6)["faults"]["window"]] == losses[2:]


def test_a_spike_of_the_gradient_alone_is_skipped(corpus: Path, tmp_path: Path) -> None:
    overrides = ("train.steps=5", *SPIKES, "faults.spike=skip", "faults.norm_factor=3")
    go(1, tmp_path, corpus, *overrides, callbacks=[Damage("gradient", "scale", {5})])
    assert kinds(tmp_path) == [(5, "persistent"), (5, "skip")] and "gradient norm" in events(tmp_path)[1]["text"]
    assert different(state(tmp_path, 4, ("model", "optimizer")), state(tmp_path, 5, ("model", "optimizer"))) == []


def test_a_warning_changes_nothing_but_the_events(corpus: Path, tmp_path: Path) -> None:
    finals = []
    for spike in ("off", "warn"):
        run = tmp_path / spike
        damage = [Noise(), Damage("loss", "scale", {5})]
        assert go(1, run, corpus, *SPIKES, f"faults.spike={spike}", callbacks=damage)[0] == 0
        finals.append(state(run, 6))
    assert different(*finals) == [] and curve(tmp_path / "off") == curve(tmp_path / "warn")
    assert kinds(tmp_path / "off") == [] and kinds(tmp_path / "warn") == [(5, "persistent"), (5, "spike")]


def test_the_same_decisions_after_a_restart_within_the_window(corpus: Path, tmp_path: Path) -> None:
    """Spikes at 5 and 8, stopped after 6: a window that began anew would be too short to see the second one."""
    overrides = ("train.steps=9", *SPIKES, "faults.spike=skip", "train.bad_steps=2")
    found = {}
    for name, stop in (("whole", None), ("broken", 6)):
        run = tmp_path / name
        damage = [Damage("loss", "scale", {5, 8}, rank=1)]
        first = go(2, run, corpus, *overrides, callbacks=damage, stop=stop)[0]
        if stop is not None:
            assert first == 75 and len(records(run)) == 6
            assert go(2, run, corpus, *overrides, callbacks=damage)[0] == 0
        decided = [{key: value for key, value in event.items() if key != "time"} for event in events(run)]
        found[name] = (curve(run), decided, meta(run, 9)["faults"], state(run, 9))
    assert found["whole"][:3] == found["broken"][:3]
    assert different(found["whole"][3], found["broken"][3]) == []
    assert kinds(tmp_path / "broken") == [(5, "persistent"), (5, "skip"), (8, "persistent"), (8, "skip")]


def test_steps_in_a_row_are_counted_over_a_restart(corpus: Path, tmp_path: Path) -> None:
    """Bad from step 4 on, at most three in a row, stopped after 5: the second start has one left."""
    damage = [Damage("gradient", "nan", set(range(4, 20)))]
    limit = ("train.steps=20", "train.bad_steps=3")
    assert go(1, tmp_path, corpus, *limit, callbacks=damage, stop=5)[0] == 75
    answer = go(1, tmp_path, corpus, *limit, callbacks=damage)[0]
    assert answer.startswith("79: step 6: 3 steps in a row were skipped") and len(records(tmp_path)) == 5
    assert kinds(tmp_path)[-3:] == [(6, "persistent"), (6, "skip"), (6, "stop")]


REPLAYS = {
    "one rank": (1, (), [0]),
    "replicas": (2, ("mesh.replicate=2",), [1]),
    "fsdp2": (2, (), [1]),
    "zero2": (2, ("engine.kind=deepspeed",), []),
}


@pytest.mark.parametrize("case", REPLAYS)
def test_a_fault_that_does_not_come_again_costs_nothing(case: str, corpus: Path, tmp_path: Path) -> None:
    """Bits of a gradient flip once, before the sum over ranks: the run ends as if it had not, and the rank is named.

    On one rank it is the activations that go wrong, so that the tokens go to other experts the first time.
    """
    world, overrides, ranks = REPLAYS[case]
    clean, struck = tmp_path / "clean", tmp_path / "struck"
    overrides = ("train.steps=4", "faults.spike=skip", *overrides)
    assert go(world, clean, corpus, *overrides, callbacks=[Noise()])[0] == 0
    where, how = ("gradient", "flip") if world > 1 else ("batch", "inf")
    damage = Damage(where, how, {3}, rank=world - 1, times=1)
    assert go(world, struck, corpus, *overrides, callbacks=[Noise(), damage])[0] == 0
    assert kinds(clean) == [] and kinds(struck) == [(3, "transient")]
    assert curve(struck) == curve(clean)
    assert records(struck)[2]["load_entropy"] == records(clean)[2]["load_entropy"]  # tokens are counted once
    assert different(state(struck, 4), state(clean, 4)) == []
    (event,) = events(struck)
    assert event["grad_norm"] is None and event["replayed_loss"] == curve(clean)[2][1]
    assert event["changed"] == ranks
    assert [label.split(" on ")[0] for label in event["where"]] == [f"rank {rank}" for rank in ranks]
    assert meta(struck, 4)["faults"]["transient"] == dict.fromkeys(event["where"], 1)


def test_a_rank_with_too_many_such_faults_ends_the_run(corpus: Path, tmp_path: Path) -> None:
    damage = [Damage("gradient", "flip", {2}, 1, times=1), Damage("gradient", "flip", {4}, 1, times=1)]
    answer = go(2, tmp_path, corpus, "faults.transient_limit=2", "faults.spike=skip", callbacks=damage)[0]
    assert answer.startswith("79: step 4: rank 1 on ") and "run again without that host" in answer
    assert kinds(tmp_path) == [(2, "transient"), (4, "transient"), (4, "stop")] and len(records(tmp_path)) == 3


def test_a_fault_that_always_comes_again_ends_the_run(corpus: Path, tmp_path: Path) -> None:
    damage = [Damage("gradient", "flip", set(range(3, 20)), rank=1)]
    answer = go(2, tmp_path, corpus, "train.bad_steps=2", callbacks=damage)[0]
    assert answer.startswith("79: step 4: 2 steps in a row were skipped, in the last one the gradient is not finite")
    assert kinds(tmp_path) == [(3, "persistent"), (3, "skip"), (4, "persistent"), (4, "skip"), (4, "stop")]
    assert [event["changed"] for event in events(tmp_path)[:4:2]] == [[], []]


def test_replay_can_be_left_out(corpus: Path, tmp_path: Path) -> None:
    damage = [Damage("gradient", "nan", {3}, times=1)]
    assert go(1, tmp_path, corpus, "train.steps=3", "faults.replay=false", callbacks=damage)[0] == 0
    assert kinds(tmp_path) == [(3, "skip")]
