"""Saves beside training hold the moment they were begun at; one at a time, in one copy of the state; failures come back."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from pretrain.checkpoint import points
from pretrain.checkpoint.background import BackgroundSaver
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.lifecycle import Checkpoints
from pretrain.train.save import Save
from tests.pretrain.checkpoint.ranks_at_work import background_saves
from tests.ranks import run_ranks


def test_a_save_holds_the_moment_it_was_begun_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(points, "observer", lambda point: gate.wait(30) if point == "writing" else None)
    done: list[int] = []
    checkpoints = Checkpoints(tmp_path)
    saver = BackgroundSaver(checkpoints, lambda step, path, seconds: done.append(step))
    w, rng = torch.arange(4.0), torch.tensor([1, 2], dtype=torch.uint8)
    saver.start(1, {"model/w": w}, {"at": 1}, {"rng": rng})
    held = saver._snapshots.take({"model/w": w})["model/w"]  # the same memory again and again
    w += 100
    rng += 1
    assert saver.busy and done == [] and checkpoints.newest() is None
    gate.set()
    assert saver.wait() is not None and done == [1] and saver.wait() is None
    loaded = torch.zeros(4)
    resumed = checkpoints.resume({"model/w": loaded})
    assert resumed is not None and loaded.tolist() == [0, 1, 2, 3] and resumed.meta == {"at": 1}
    assert resumed.per_rank is not None and resumed.per_rank["rng"].tolist() == [1, 2]
    saver.start(2, {"model/w": w}, {}, {})
    assert saver._snapshots._memory["model/w", ()].data_ptr() == held.data_ptr()
    saver.wait()
    assert checkpoints.resume({"model/w": loaded}) is not None and loaded.tolist() == [100, 101, 102, 103]


def test_a_failure_comes_back_at_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(point: str) -> None:
        if point == "written":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(points, "observer", fail)
    saver = BackgroundSaver(Checkpoints(tmp_path), lambda *_: pytest.fail("nothing was saved"))
    saver.start(1, {"model/w": torch.ones(2)}, {}, {})
    with pytest.raises(CheckpointError, match="No space left"):
        saver.wait()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(points, "observer", None)
    saver.done = lambda *_: None
    saver.start(2, {"model/w": torch.ones(2)}, {}, {})
    saver.wait()
    assert [entry.step for entry in saver.checkpoints.list()] == [2]


def test_a_broken_run_waits_no_longer_than_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save is stuck, as with a rank that is gone. What has failed without the ranks' agreement ends soon all the same."""
    gate = threading.Event()
    monkeypatch.setattr(points, "observer", lambda point: gate.wait(10) if point == "writing" else None)
    save = Save(Checkpoints(tmp_path), cast(Any, None), cast(Any, None))
    run = SimpleNamespace(step=0, broken=True, config=SimpleNamespace(train=SimpleNamespace(timeout=0.1)))
    save.on_start(cast(Any, run))
    save.background.start(1, {"model/w": torch.ones(2)}, {}, {})
    save.close()
    assert save.background.busy
    with pytest.raises(TimeoutError, match=r"was not done after 0\.1 s"):
        save.background.wait(0.1)
    run.broken, save.progress = False, cast(Any, SimpleNamespace(say=lambda text: None))
    threading.Timer(0.3, gate.set).start()
    save.close()  # all ranks have agreed to end: the save is brought to its end
    assert [entry.step for entry in save.checkpoints.list()] == [1]


def test_ranks_save_beside_collectives_and_fail_alike(tmp_path: Path) -> None:
    """Sharded and replicated tensors, saved while the ranks go on reducing; then a failure on one rank is everybody's."""
    results = run_ranks(background_saves, 3, tmp_path)
    assert [rows for rows, _, _ in results] == [[[0.0], [1.0], [2.0], [3.0], [4.0]]] * 3  # 5 rows over 3 ranks
    assert [total for _, total, _ in results] == [[0.0 + 1.0 + 2.0] * 20] * 3
    texts = {text for _, _, text in results}
    assert len(texts) == 1 and "rank 1: OSError" in texts.pop()
