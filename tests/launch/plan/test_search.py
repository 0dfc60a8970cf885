from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from launch.plan import show, sweep
from launch.plan.legal import divisors
from launch.plan.reasons import settings, why
from launch.plan.room import remedies
from launch.plan.search import Search
from launch.plan.source import with_
from parallel.engines import TorchConfig
from parallel.engines.deepspeed import DeepSpeedConfig
from parallel.mesh import layouts
from pretrain.config import load
from pretrain.train import layout
from tests.launch.plan.cases import files, question


def search(folder: Path, gpus: int, *fixed: str, **options: Any) -> tuple[Any, Any, Any]:
    asked, planner, legality = question(folder, gpus, *fixed, **options)
    keys = frozenset(each.partition("=")[0] for each in fixed)
    return asked, planner, Search(planner, legality, keys).run(asked.config, gpus)


def test_every_layout_found_is_one_that_the_run_accepts(tmp_path: Path) -> None:
    _, _, found = search(tmp_path, 16)
    assert len(found.ranked) > 15
    for each in found.ranked:
        assert layout.check(each.config, 16) == each.grid
        assert each.fits
    times = [each.time.seconds for each in found.ranked]
    assert times == pytest.approx(sorted(times))
    assert {each.grid.pp > 1 for each in found.ranked} == {True, False}
    assert any(each.grid.ep > 1 for each in found.ranked)


def test_nothing_faster_is_overlooked(tmp_path: Path) -> None:
    """Every legal layout of 8 ranks, with every micro-batch, recomputation and engine, by brute force."""
    asked, planner, found = search(tmp_path, 8)
    engines = [
        TorchConfig(), TorchConfig(reshard_after_forward=False), TorchConfig(reduce_each_micro_batch=True),
        *(DeepSpeedConfig(stage=stage, overlap_comm=True) for stage in (1, 2, 3)),
    ]  # fmt: skip
    best, legal = float("inf"), 0
    for mesh, micro_batch in itertools.product(layouts(8), (1, 2, 4, 8, 16, 32, 64)):
        for engine in engines:
            one = with_(asked.config, train={"micro_batch": micro_batch})
            one = one.model_copy(update={"mesh": mesh, "engine": engine})
            grid = mesh.grid(8)
            if planner.question.config.train.batch % (grid.dp * micro_batch):
                continue
            try:
                layout.check_batch(one, grid)
                layout.check_model(one, grid, asked.model.model)
            except ValueError:
                continue
            legal += 1
            each = planner.forecast(one, grid)
            if each.fits:
                best = min(best, each.time.seconds)
    assert legal > 100
    assert found.ranked[0].time.seconds <= best * (1 + 1e-9)


def test_what_is_given_stays(tmp_path: Path) -> None:
    _, _, found = search(tmp_path, 8, "mesh.tp=2", "train.micro_batch=4", "engine.kind=torch")
    assert found.ranked
    for each in found.ranked:
        assert (each.grid.tp, each.config.train.micro_batch, each.config.engine.kind) == (2, 4, "torch")


def test_refused_classes_have_the_run_s_own_reasons(tmp_path: Path) -> None:
    _, _, found = search(tmp_path, 32, "mesh.pp=2")
    text = {each.what: each.reason for each in found.refused}
    assert any(what.startswith("tp = 8") and "cannot be cut over mesh.tp=8" in reason for what, reason in text.items())
    assert show.refused(found) is not None


def test_the_ranking_says_why_others_lose(tmp_path: Path) -> None:
    asked, _, found = search(tmp_path, 8)
    first, *others = found.ranked
    assert all(why(each, first) for each in others)
    assert "the configuration has it already" in show.to_use(first, first.config)
    given = settings(first.config, asked.config)
    config, _ = files(tmp_path)
    again = load(config, given)
    assert again.mesh.grid(8) == first.grid
    assert again.engine == first.config.engine
    assert again.train == first.config.train


def test_no_memory_at_all(tmp_path: Path) -> None:
    _, _, found = search(tmp_path, 8, memory=0.0005)
    assert not found.ranked
    assert found.closest is not None and found.closest.excess > 0
    assert any("does not fit" in each.reason for each in found.refused)
    assert sweep.no_layout(found).startswith("nothing fits")


def test_remedies_fit_and_are_legal(tmp_path: Path) -> None:
    asked, planner, legality = question(tmp_path, 8, "train.micro_batch=8", memory=16)
    plain = planner.forecast(asked.config, asked.config.mesh.grid(8))
    tight = plain.costs.peak * 0.7 / 2**30
    asked, planner, legality = question(tmp_path, 8, "train.micro_batch=8", memory=tight)
    short = planner.forecast(asked.config, asked.config.mesh.grid(8))
    assert short.excess == pytest.approx(plain.costs.peak * 0.3, rel=1e-6)
    found = remedies(planner, legality, short)
    assert found
    config, _ = files(tmp_path)
    for remedy in found:
        keys = [f"{key}={value}" for key, value in remedy.changes.items() if key != "gpus"]
        again = load(config, ["train.micro_batch=8", *keys])
        grid = layout.check(again, remedy.changes.get("gpus", 8))
        assert planner.forecast(again, grid).excess <= 0
    assert "DOES NOT FIT" in show.shortage(short, found)[0]


def test_nothing_is_proposed_where_nothing_helps(tmp_path: Path) -> None:
    asked, planner, legality = question(tmp_path, 1, memory=0.0005)
    short = planner.forecast(asked.config, asked.config.mesh.grid(1))
    found = remedies(planner, legality, short)
    assert all(remedy.forecast.fits for remedy in found)
    if not found:
        assert "No single change" in show.shortage(short, found)[1]


def test_scaling_curves(tmp_path: Path) -> None:
    asked, planner, legality = question(tmp_path, 8)
    found = sweep.curves(Search(planner, legality), asked.config, 8, (1, 2, 8, 64, 100_000))
    assert [point.gpus for point in found.weak] == [1, 2, 8, 64, 100_000]
    assert found.efficiency(found.weak, found.weak[0]) == 1.0
    assert all(point.forecast is not None for point in found.weak)
    strong = [point for point in found.strong if point.forecast is not None]
    assert len(strong) >= 3
    for point in strong:
        assert point.forecast is not None and point.forecast.config.train.batch == 64
    for point in found.weak:
        assert point.forecast is not None and point.forecast.config.train.batch == 8 * point.gpus
    last = found.strong[-1]
    assert last.forecast is None and "batch" in last.refusal
    # With the batch fixed, a GPU never works better for company.
    shares = [found.efficiency(found.strong, point) or 0 for point in strong]
    assert shares == sorted(shares, reverse=True)


def test_a_sweep_with_one_layout(tmp_path: Path) -> None:
    asked, planner, legality = question(tmp_path, 8, "mesh.tp=2", "mesh.pp=2")
    found = sweep.curves(Search(planner, legality), asked.config, 8, (2, 8, 16), keep_layout=True)
    assert found.weak[0].forecast is None and "does not divide" in found.weak[0].refusal
    for point in found.weak[1:]:
        assert point.forecast is not None
        assert (point.forecast.grid.tp, point.forecast.grid.pp) == (2, 2)


def test_divisors() -> None:
    for number in (1, 2, 7, 12, 36, 97, 100_000):
        assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]
