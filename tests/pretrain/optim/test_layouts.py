"""Muon and LAMB on layouts of ranks train as they do on one rank: a slice here, every layout of the gate in the campaign."""

from __future__ import annotations

from typing import Any

import pytest

from parallel.mesh import MeshConfig
from pretrain.equivalence import layouts
from pretrain.equivalence.gate import short_run
from tests.pretrain.equivalence_models import MODELS, config
from tests.pretrain.optim.layout_ranks import verdicts
from tests.ranks import run_ranks


def mesh(**sizes: Any) -> MeshConfig:
    return MeshConfig.model_validate(sizes)


# FSDP2, replicas, tensor parts with copies of key heads, spread experts (cut besides), pipelines whose ends share an embedding.
SLICE: list[tuple[str, str, dict[str, Any], list[MeshConfig]]] = [
    ("attention MoE", "muon", {}, [mesh(tp=2, ep=4), mesh(pp=2, ep=2, pp_schedule="zbv")]),
    ("attention MoE", "muon", {"per_head": True, "nesterov": False}, [mesh(dp=4, replicate=2)]),
    ("UoE + Hourglass", "muon", {"scaling": "spectral"}, [mesh(tp=2, dp=2)]),
    ("GDN hybrid MoE", "muon", {}, [mesh(tp=2, expert_tensor=True, ep=2)]),
    ("attention MoE", "lamb", {}, [mesh(pp=2, tp=2)]),
]


def check(found: dict[tuple[str, str], dict[str, tuple[bool, list[str], float]]], expected: int) -> None:
    print(
        "".join(f"\n{key}, {layout}: update {of[2]:.0e}" for key, each in found.items() for layout, of in each.items())
    )
    wrong = [
        f"{key}, {layout}: {faults}"
        for key, each in found.items()
        for layout, (agrees, faults, _) in each.items()
        if not agrees
    ]
    assert not wrong, "\n".join(wrong)
    assert sum(map(len, found.values())) == expected


def test_a_slice_of_the_layouts_trains_as_one_rank() -> None:
    check(run_ranks(verdicts, 4, SLICE, timeout=300)[0], 6)


@pytest.mark.campaign
@pytest.mark.parametrize("optimizer", ["muon", "lamb"])
@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_trains_as_one_rank(optimizer: str, world: int) -> None:
    """All layouts of the gate's five models; `pytest --campaign -s` prints the differences."""
    wanted = [(model, optimizer, {}, layouts.legal(short_run(config(model), world), world)) for model in MODELS]
    check(run_ranks(verdicts, world, wanted, timeout=3000)[0], sum(len(each) for *_, each in wanted))
