"""What the ranks of the probe's tests run, with a fault planted in the optimizer if asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.newton_schulz import newton_schulz
from parallel.mesh import Mesh, MeshConfig
from parallel.processes import Processes
from pretrain.optim import muon
from pretrain.optim.lamb import LAMB
from pretrain.optim.muon import Muon
from pretrain.optim.probe.__main__ import data
from pretrain.optim.probe.judge import Line
from pretrain.optim.probe.run import probe
from tests.pretrain.optim.layout_ranks import short


def silently_sgd(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(muon, "newton_schulz", lambda x, name: x)


def silently_normalised(patch: pytest.MonkeyPatch) -> None:
    """As large as Muon's update, but momentum itself."""

    def normalise(x: Tensor, name: str) -> Tensor:
        return x / torch.linalg.matrix_norm(x, keepdim=True) * min(x.shape[-2:]) ** 0.5

    patch.setattr(muon, "newton_schulz", normalise)


def silently_adamw(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(muon, "describe", lambda *arguments: {})


def shards_orthogonalised(patch: pytest.MonkeyPatch) -> None:
    """Each rank orthogonalises what it happens to hold."""

    def apply(self: Any, pieces: list[Any], results: list[Tensor], lr: float) -> None:
        for piece in pieces:
            own = newton_schulz(piece.of(self._direction(piece.part)).float())
            piece.of(self.parameters[piece.part].detach()).add_(own, alpha=-lr * self.config.scale(piece.matrix))

    patch.setattr(Muon, "_apply", apply)


def momentum_forgotten(patch: pytest.MonkeyPatch) -> None:
    step = Muon.step

    def forgetful(self: Muon) -> None:
        for state in self.state.values():
            if "momentum_buffer" in state:
                state["momentum_buffer"].zero_()
        step(self)

    patch.setattr(Muon, "step", forgetful)


def no_decay(patch: pytest.MonkeyPatch) -> None:
    step = Muon.step

    def gentle(self: Muon) -> None:
        for group in self.param_groups:
            group["weight_decay"] = 0.0
        step(self)

    patch.setattr(Muon, "step", gentle)


def no_trust_ratio(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LAMB, "_ratios", lambda self, updates: torch.ones(len(self.layers), dtype=torch.float64))


def norms_of_shards(patch: pytest.MonkeyPatch) -> None:
    ratios = LAMB._ratios

    def own(self: Any, updates: dict[Tensor, Tensor]) -> Tensor:
        group, self.group = self.group, None
        found = ratios(self, updates)
        self.group = group
        return found

    patch.setattr(LAMB, "_ratios", own)


FAULTS = {
    fault.__name__: fault
    for fault in (
        silently_sgd,
        silently_normalised,
        silently_adamw,
        shards_orthogonalised,
        momentum_forgotten,
        no_decay,
        no_trust_ratio,
        norms_of_shards,
    )
}


def lines(
    rank: int,
    world: int,
    model: str,
    optimizer: str,
    sizes: dict[str, Any],
    faults: list[str | None],
    changes: dict[str, Any],
) -> list[list[Line]]:
    """For each fault (None: none) the probe's lines."""
    found = []
    for fault in faults:
        run = short(model, world, optimizer, **{"lr": 0.1, **changes})
        run = run.model_copy(update={"mesh": MeshConfig.model_validate(sizes)})
        job = Processes(rank, world, rank, torch.device("cpu"))
        mesh = Mesh(run.mesh, job)
        with pytest.MonkeyPatch.context() as patch:
            if fault is not None:
                FAULTS[fault](patch)
            run, batches = data(run, mesh, random=True, steps=2)
            found.append(probe(run, job, mesh, batches, 2))
    return found


def furthest(
    rank: int, world: int, model: str, optimizer: str, meshes: list[dict[str, Any]]
) -> list[tuple[float, int]]:
    """For each layout, how far the furthest parameter is from one rank's, given the same gradients; how many are wrong."""
    found = []
    for sizes in meshes:
        (each,) = lines(rank, world, model, optimizer, sizes, [None], {})
        found.append((max((line.alone for line in each), default=0.0), sum(bool(line.faults) for line in each)))
    return found
