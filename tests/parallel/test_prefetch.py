"""FSDP2 gathers as many units ahead as the configuration says, in the order in which they are needed."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from parallel.processes import join
from tests.ranks import run_ranks

BLOCKS = 4


class Block(nn.Module):
    def __init__(self, name: str, events: list[str]):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.name, self.events = name, events

    def forward(self, x: Tensor) -> Tensor:
        self.events.append(f"forward {self.name}")
        y: Tensor = self.linear(x)
        y.register_hook(lambda _: self.events.append(f"backward {self.name}"))
        return y


def order(rank: int, world: int, depth: int, bucket_bytes: int | None) -> tuple[list[str], list[Tensor]]:
    """What happens in one step: each unit's gathering when it is begun, each block's passes. And the gradients."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    from parallel.engines.torch import TorchConfig, shard
    from parallel.grid import MeshConfig
    from parallel.mesh import Mesh

    events: list[str] = []
    real = FSDPParamGroup.unshard

    def unshard(group: Any, *args: Any, **kwargs: Any) -> None:
        begun = group._all_gather_result is not None or group.is_unsharded
        real(group, *args, **kwargs)
        if not begun and group._all_gather_result is not None:
            events.append(f"gather {group._module_fqn or 'root'}")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), *(Block(str(i), events) for i in range(1, BLOCKS + 1)))
    config = TorchConfig(prefetch=depth, bucket_bytes=bucket_bytes)
    shard(model, list(model)[1:], Mesh(MeshConfig(), join("cpu")), config)
    with patch.object(FSDPParamGroup, "unshard", unshard):
        model(torch.ones(3, 4)).square().sum().backward()
    gradients = [p.grad.full_tensor() for p in model.parameters()]  # type: ignore[union-attr]
    return events, gradients


def expected(depth: int) -> list[str]:
    """By hand: when a unit begins, all up to `depth` units behind it have been asked for."""
    events, asked = ["gather root"], set()

    def ask(units: list[int]) -> None:
        for unit in units:
            if 1 <= unit <= BLOCKS and unit not in asked:
                asked.add(unit)
                events.append(f"gather {unit}")

    ask(list(range(1, depth + 1)))
    for unit in range(1, BLOCKS + 1):
        ask([unit, *range(unit + 1, unit + depth + 1)])
        events.append(f"forward {unit}")
    asked.clear()  # each is freed after its forward pass
    ask(list(range(BLOCKS, BLOCKS - depth, -1)))
    for unit in range(BLOCKS, 0, -1):
        ask([unit, *range(unit - 1, unit - depth - 1, -1)])
        events.append(f"backward {unit}")
    return events


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_units_are_gathered_ahead(depth: int) -> None:
    (events, gradients), _ = run_ranks(order, 2, depth, None)
    # A hook on a block's output runs before FSDP2's own, which is on the same tensor but was put there later: so a unit's
    # gradient arrives, then it asks for more.
    assert [e for e in events if e.startswith(("gather", "forward"))] == [
        e for e in expected(depth) if e.startswith(("gather", "forward"))
    ]
    begun = {event: at for at, event in enumerate(events[events.index(f"forward {BLOCKS}") :])}
    for unit in range(BLOCKS - depth, 0, -1):
        assert begun[f"gather {unit}"] < begun[f"backward {unit + depth - 1}"], (unit, events)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), *(Block("", []) for _ in range(BLOCKS)))
    plain(torch.ones(3, 4)).square().sum().backward()
    for ours, parameter in zip(gradients, plain.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(ours, 2 * parameter.grad)  # two ranks, whose gradients are summed


def test_joined_blocks_are_one_unit() -> None:
    """Two units of two blocks: the second is gathered while the first one's first block is yet to run."""
    (events, _), _ = run_ranks(order, 2, 1, 100)
    gathers = [event for event in events if event.startswith("gather")]
    assert len(gathers) == 5  # the root; both units forward; both backward
    assert events.index("forward 1") > events.index(gathers[2])
