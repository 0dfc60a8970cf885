"""Optimizer state goes from layout to layout with a checkpoint: a step here, a step there, and the end is one rank's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pretrain.optim.reshape_ranks import run
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("optimizer", "first", "second"),
    [("muon", {"dp": 2}, {"tp": 2}), ("lamb", {"tp": 2}, {"pp": 2})],
)
def test_two_steps_on_two_layouts(
    optimizer: str, first: dict[str, Any], second: dict[str, Any], tmp_path: Path
) -> None:
    folder = str(tmp_path)
    (alone,) = run_ranks(run, 1, optimizer, {}, None, [0, 1], None)
    half, _ = run_ranks(run, 2, optimizer, first, None, [0], folder)
    end, _ = run_ranks(run, 2, optimizer, second, folder, [1], None)
    assert set(end) == set(half) == set(alone)
    state = "momentum_buffer" if optimizer == "muon" else "exp_avg"
    assert f"optimizer/blocks.0.mixer.qkv.weight/{state}" in end
    moved = 0
    for name, expected in alone.items():
        off = (end[name].double() - expected.double()).abs().max().item()
        assert off <= max(1e-5 * expected.abs().max().item(), 1e-7), f"{name}: {off:.0e}"
        moved += not torch.equal(half[name], expected)
    assert moved > len(alone) / 2
    found = run_ranks(run, 1, optimizer, {}, folder, [], None)[0]  # back on one rank, every bit as it was saved
    assert all(torch.equal(found[name], half[name]) for name in half)
