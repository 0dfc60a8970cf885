"""FSDP2 cuts a parameter where it need not fill it up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from parallel.engines.placement import dim_to_cut, placement
from parallel.processes import join
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("shape", "ranks", "dim"),
    [
        ((2048, 2048), 1024, 0),
        ((16, 4096, 2048), 1024, 1),  # would be 64 times as large
        ((16, 2048, 4096), 1024, 2),
        ((16, 4096, 2048), 8, 0),
        ((9, 64), 8, 1),  # 16 rows for 9
        ((15, 64), 8, 0),  # 16 rows for 15
        ((16, 63, 65), 1024, 0),  # nothing divides
        ((3,), 8, 0),
    ],
)
def test_which_dim(shape: tuple[int, ...], ranks: int, dim: int) -> None:
    assert dim_to_cut(shape, ranks) == dim
    found = placement(nn.Parameter(torch.empty(shape, device="meta")), ranks)
    assert (found.dim if found else 0) == dim


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(2, 8, 3))
        self.norm = nn.Parameter(torch.ones(2))


def held(rank: int, world: int) -> tuple[int, int, bool]:
    """Elements of this rank's shard, the dim that was cut, and whether all parameters are whole again when gathered."""
    from parallel.engines.torch import TorchConfig, shard
    from parallel.grid import MeshConfig
    from parallel.mesh import Mesh

    torch.manual_seed(0)
    model = nn.Sequential(Experts())
    whole = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    processes = join("cpu")
    shard(model, list(model), Mesh(MeshConfig(), processes), TorchConfig())
    parameters = dict(model.named_parameters())
    local = parameters["0.first"].to_local()
    same = all(torch.equal(parameter.full_tensor(), whole[name]) for name, parameter in parameters.items())
    return local.numel(), parameters["0.first"].placements[0].dim, same


def test_experts_fewer_than_ranks_are_held_once() -> None:
    assert run_ranks(held, 4) == [(2 * 8 * 3 // 4, 1, True)] * 4
