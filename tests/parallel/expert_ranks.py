"""What the ranks of test_expert.py do: imported by forked processes, so without pytest."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.experts import experts
from parallel.expert import AllToAllExperts, ExpertTensor
from parallel.mesh import Mesh, MeshConfig
from parallel.processes import Processes

D, E, F = 6, 8, 4


def processes(rank: int, world: int) -> Processes:
    return Processes(rank, world, rank, torch.device("cpu"))


def mesh(rank: int, world: int, **sizes: Any) -> Mesh:
    return Mesh(MeshConfig(**sizes), processes(rank, world))


class Case(NamedTuple):
    """counts: tokens of each rank. used: the experts that are chosen from."""

    counts: tuple[int, ...]
    k: int
    used: int = E
    dtype: torch.dtype = torch.float64


class Inputs(NamedTuple):
    tokens: Tensor
    gate_up: Tensor
    down: Tensor
    indices: Tensor
    scores: Tensor
    upstream: Tensor


def inputs(case: Case, rank: int) -> Inputs:
    """A rank's tokens and choices, and the whole weights, the same on all ranks."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)
    N = case.counts[rank]

    def normal(*shape: int, generator: torch.Generator) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Inputs(
        tokens=normal(N, D, generator=own).to(case.dtype),
        gate_up=normal(E, D, 2 * F, generator=shared),
        down=normal(E, F, D, generator=shared),
        indices=torch.rand(N, case.used, generator=own).argsort(-1)[:, : case.k],
        scores=torch.rand(N, case.k, generator=own, dtype=torch.float64),
        upstream=normal(N, D, generator=own).to(case.dtype),
    )


def differentiated(function: Any, given: Inputs) -> list[Tensor]:
    """[y, and the gradients of tokens, gate_up, down and scores]."""
    leaves = [x.detach().clone().requires_grad_() for x in (given.tokens, given.gate_up, given.down, given.scores)]
    tokens, gate_up, down, scores = leaves
    y = function(tokens, gate_up, down, given.indices, scores)
    y.backward(given.upstream)
    return [y.detach(), *(x.grad for x in leaves)]


def on_one_rank(case: Case) -> list[list[Tensor]]:
    """What `dispatched` of each rank should return, weights' gradients whole."""
    parts = [inputs(case, rank) for rank in range(len(case.counts))]
    joined = Inputs(*(torch.cat(x) for x in zip(*parts)))._replace(gate_up=parts[0].gate_up, down=parts[0].down)
    y, tokens, gate_up, down, scores = differentiated(experts, joined)
    cut = [x.split(case.counts) for x in (y, tokens, scores)]
    return [[y, tokens, gate_up, down, scores] for y, tokens, scores in zip(*cut)]


def hidden_part(weights: Inputs, rank: int, ranks: int) -> Inputs:
    f = F // ranks
    own = slice(rank * f, (rank + 1) * f)
    gate, up = weights.gate_up.chunk(2, dim=-1)
    return weights._replace(gate_up=torch.cat((gate[..., own], up[..., own]), dim=-1), down=weights.down[:, own])


def dispatched(rank: int, world: int, cases: list[Case], kind: str) -> list[list[Tensor]]:
    """kind: "ep" over all ranks, "tp" over all ranks, or "both" with tp = 2; twice, to see that nothing depends on chance."""
    found = []
    whole = dist.group.WORLD
    assert whole is not None
    if kind == "both":
        tp, _ = dist.new_subgroups_by_enumeration([[i, i + 1] for i in range(0, world, 2)])
        ep, _ = dist.new_subgroups_by_enumeration([list(range(i, world, 2)) for i in (0, 1)])
    for case in cases:
        given = inputs(case, rank)
        dispatcher: Any
        if kind == "tp":
            dispatcher, given = ExpertTensor(whole), hidden_part(given, rank, world)
        else:
            dispatcher = AllToAllExperts(whole, E)
            holder, holders = rank, world
            if kind == "both":
                dispatcher = AllToAllExperts(ep, E, ExpertTensor(tp))
                holder, holders = rank // 2, world // 2
                given = hidden_part(given, rank % 2, 2)
            own = slice(holder * E // holders, (holder + 1) * E // holders)
            given = given._replace(gate_up=given.gate_up[own], down=given.down[own])
        first, second = differentiated(dispatcher, given), differentiated(dispatcher, given)
        assert all(torch.equal(a, b) for a, b in zip(first, second)), "not deterministic"
        found.append(first)
    return found
