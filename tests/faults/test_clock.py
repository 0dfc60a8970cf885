"""A clock that is an hour off, or goes back: which checkpoint is the newest does not depend on it."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.checkpoint import lifecycle
from pretrain.checkpoint.lifecycle import Checkpoints


@pytest.mark.parametrize("hours", [1, -1, -24 * 365 * 60])
def test_the_newest_checkpoint_is_the_one_committed_last(
    hours: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    weight = torch.zeros(3)
    for step in (1, 2, 3):
        if step == 2:  # the clock jumps between two saves, files get its times too
            shifted = datetime.now(UTC) + timedelta(hours=hours)

            monkeypatch.setattr(lifecycle, "datetime", SimpleNamespace(now=lambda zone, shifted=shifted: shifted))
            monkeypatch.setattr(time, "time", shifted.timestamp)
        checkpoints.save(step, {"model/weight": weight.fill_(step)}, {"step": step})
    assert [entry.step for entry in checkpoints.list()] == [3, 2]
    found = {"model/weight": torch.zeros(3)}
    resumed = Checkpoints(tmp_path).resume(found)
    assert resumed is not None and resumed.step == 3 and found["model/weight"].tolist() == [3, 3, 3]
