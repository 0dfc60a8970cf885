"""The optimizer probe: right optimizers pass under several layouts, planted faults do not, and the command says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.equivalence import layouts
from pretrain.equivalence.gate import short_run
from pretrain.optim.probe.__main__ import main
from pretrain.optim.probe.judge import Line
from tests.pretrain.equivalence_models import MODELS, config
from tests.pretrain.optim.probe_ranks import FAULTS, furthest, lines
from tests.ranks import ROOT, run_ranks

MUON = ["silently_sgd", "silently_normalised", "silently_adamw", "momentum_forgotten", "no_decay"]
SMALL = ["model.width=32", "data.sequence_length=32", "train.batch=4", "train.micro_batch=2", "train.precision=fp32"]


def wrong(found: list[Line]) -> list[str]:
    return [f"{line.name} {line.faults}" for line in found if line.faults]


@pytest.mark.parametrize(
    ("optimizer", "changes", "faults"),
    [
        ("muon", {}, MUON),
        ("muon", {"precision": "bf16"}, ["silently_sgd", "silently_normalised"]),
        ("muon", {"scaling": "spectral", "per_head": True, "iteration": "quintic", "adamw": ["*.router.*"]}, []),
        ("lamb", {}, ["no_trust_ratio"]),
        ("sgd", {"momentum": 0.0, "nesterov": False}, []),
        ("adamw", {}, []),
    ],
)
def test_on_one_rank(optimizer: str, changes: dict[str, Any], faults: list[str]) -> None:
    good, *bad = lines(0, 1, "attention MoE", optimizer, {}, [None, *faults], changes)
    assert wrong(good) == []
    rules = {line.name: line.rule for line in good}
    assert rules["blocks.0.mixer.qkv.weight"] == optimizer
    assert rules["embedding.weight"] == ("adamw" if optimizer == "muon" else optimizer)
    if changes.get("adamw"):
        assert rules["blocks.1.ffn.router.weight"] == "adamw"
    for fault, found in zip(faults, bad):
        assert any(line.startswith("blocks.0.mixer.qkv.weight") for line in wrong(found)), fault


def test_what_a_fault_is_called() -> None:
    """A Muon that is SGD shows in singular values; each expert's matrices are looked at."""
    (found,) = lines(0, 1, "attention MoE", "muon", {}, ["silently_normalised"], {})
    (line,) = [line for line in found if line.name == "blocks.1.ffn.gate_up"]
    assert line.matrices == 16
    assert line.values is not None and line.values[0] < 0.5
    assert "is not what muon computes" in " ".join(line.faults)
    assert "singular values" in " ".join(line.faults)


@pytest.mark.parametrize(
    ("optimizer", "sizes", "fault"),
    [
        ("muon", {"tp": 2, "ep": 2}, "shards_orthogonalised"),
        ("muon", {"dp": 2}, "shards_orthogonalised"),
        ("lamb", {"dp": 2}, "norms_of_shards"),
        ("adamw", {"pp": 2}, None),
    ],
)
def test_on_two_ranks(optimizer: str, sizes: dict[str, Any], fault: str | None) -> None:
    faults = [None] if fault is None else [None, fault]
    good, *bad = run_ranks(lines, 2, "attention MoE", optimizer, sizes, faults, {})[0]
    assert wrong(good) == []
    assert max(line.alone for line in good) <= 1e-5
    assert len(good) > 20
    for found in bad:
        assert wrong(found)


@pytest.mark.campaign
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_of_the_gate_equals_one_rank(model: str, world: int) -> None:
    """Given the same gradients, to 1e-5 in fp32; `pytest --campaign -s` prints how far each layout is off."""
    legal = layouts.legal(short_run(config(model), world), world)
    meshes = [mesh.model_dump(exclude_defaults=True) for mesh in legal]
    found = run_ranks(furthest, world, model, "muon", meshes, timeout=3000)[0]
    for mesh, (off, wrong) in zip(legal, found, strict=True):
        print(f"{model}, {layouts.name(mesh, world)}: {off:.0e}")
        assert off <= 1e-5 and wrong == 0, layouts.name(mesh, world)


def test_every_fault_is_planted_somewhere() -> None:
    assert set(FAULTS) == {*MUON, "shards_orthogonalised", "no_trust_ratio", "norms_of_shards"}


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(ROOT)
    call = ["--config", "configs/runs/quickstart.yaml", "--random", *SMALL, "optimizer.kind=muon", "optimizer.lr=0.1"]
    threads = torch.get_num_threads()
    assert main([*call, "optimizer.precision=fp32"]) == 0
    said = capsys.readouterr().out
    assert "45 of 45 parameters are updated as optimizer.kind=muon says, on 1 rank(s): 19 by adamw, 26 by muon" in said
    FAULTS["silently_sgd"](monkeypatch)
    assert main([*call, "optimizer.precision=fp32"]) == 1
    said = capsys.readouterr().out
    assert "19 of 45 parameters" in said and "WRONG" in said
    assert "blocks.0.mixer.qkv.weight is not what muon computes" in said
    assert main([*call, "engine.kind=deepspeed"]) == 2
    assert main(["--config", "configs/runs/quickstart.yaml", *SMALL, f"data.path={tmp_path / 'none'}"]) == 77
    assert "--random" in capsys.readouterr().err
    torch.set_num_threads(threads)
