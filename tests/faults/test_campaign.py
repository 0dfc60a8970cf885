"""A small seeded slice of the campaign, and that its table names tests that exist."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from tests.faults import kills
from tests.faults.kills import Kill, Trials, draw
from tests.faults.reshapes import Reshapes
from tests.faults.rows import ROWS
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trials(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tmp_path_factory.mktemp("trials"), corpus)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.campaign) for seed in range(2, 8))])
def test_a_killed_run_ends_like_an_untouched_one(seed: int, trials: Trials) -> None:
    outcome = trials.trial(draw(random.Random(seed), ["one rank", "FSDP2"]))
    assert outcome.faults == []


@pytest.mark.parametrize("moment", ["staging", "writing", "manifest", "renamed", "pruning"])
def test_a_kill_at_a_point_of_a_save_happens_there(moment: str, trials: Trials) -> None:
    outcome = trials.trial(Kill("FSDP2", True, (0,), moment, 2))
    assert outcome.faults == [] and outcome.happened and outcome.detection is not None
    # The second save is that of step 4. Before its name is there, the first one counts.
    before = moment in ("staging", "writing", "manifest")
    assert outcome.steps_lost >= 2 if before else outcome.steps_lost <= 2


def test_a_trial_notices_a_run_that_lost_something(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start takes another seed for the data, as if the position in the data had been lost."""
    other = ("data.seed=5", "checkpoint.allow_changes=[data.seed]")

    def forgetful(
        function: Any, world: int, run: Path, corpus: Path, overrides: tuple[str, ...], *rest: Any, **options: Any
    ) -> Any:
        changed = (*overrides, *other) if function is kills.started_again else overrides
        return run_ranks(function, world, run, corpus, changed, *rest, **options)

    trials.reference("one rank")
    monkeypatch.setattr(kills, "run_ranks", forgetful)
    outcome = trials.trial(Kill("one rank", False, (0,), "step", 5))
    assert "losses differ from the untouched run's" in outcome.faults


@pytest.mark.campaign
def test_runs_that_change_their_layout(corpus: Path, tmp_path: Path) -> None:
    """The one of seed 0 is in the command of README.md, whose test runs it."""
    _, faults = Reshapes(tmp_path, corpus).trial(random.Random(1))
    assert faults == []


def test_the_table_has_all_rows_and_its_tests_exist() -> None:
    assert sorted(ROWS) == list(range(1, 22))
    for number, row in ROWS.items():
        for node in row.tests:
            path, _, name = node.partition("::")
            assert (ROOT / path).exists(), (number, node)
            assert not name or re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.M), (number, node)
