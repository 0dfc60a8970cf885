"""A trained run, small enough for every test of evaluation: a few steps of the tests' configuration, ended before validation."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.exit import PREEMPTED
from tests.pretrain.train.small_run import StopAfter, configuration, train


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    assert train(configuration(folder, corpus, "model.repeat=3"), [StopAfter(4)]) == PREEMPTED
    return folder
