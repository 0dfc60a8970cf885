"""What the ranks of test_mesh.py do."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import fully_shard

from parallel.mesh import AXES, Mesh, MeshConfig
from parallel.processes import Processes

CPU = torch.device("cpu")


def mesh(rank: int, world: int, **sizes: Any) -> Mesh:
    return Mesh(MeshConfig(**sizes), Processes(rank, world, rank, CPU))


def members(group: dist.ProcessGroup | None) -> list[int] | None:
    return None if group is None else dist.get_process_group_ranks(group)


def describe(rank: int, world: int, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each layout and axis what this rank's mesh says, and who answers when it adds over the group."""
    found = []
    for sizes in layouts:
        ours = mesh(rank, world, **sizes)
        about: dict[str, Any] = {"place": (ours.dp_rank, ours.dp_size), "dp mesh": ours.dp and ours.dp.mesh.tolist()}
        for axis in AXES:
            heard, group = None, ours.group(axis)
            if group is not None:
                total = torch.tensor(2**rank)
                dist.all_reduce(total, group=group)
                heard = [r for r in range(world) if int(total) >> r & 1]
                assert dist.get_rank(group) == ours.rank(axis)
                assert ours.device_mesh(axis).get_local_rank() == ours.rank(axis)
                assert ours.device_mesh(axis).get_group() is group
            about[axis] = (ours.ranks(axis), ours.rank(axis), ours.size(axis), heard)
        about["groups"] = len({id(g) for g in map(ours.group, AXES) if g not in (None, dist.group.WORLD)})
        found.append(about)
    return found


def megatron(rank: int, world: int, layouts: list[dict[str, Any]]) -> list[dict[str, tuple[list[int], list[int]]]]:
    """For each layout: the ranks of megatron-core's groups, and of ours for the same purpose."""
    from megatron.core import parallel_state as theirs

    found = []
    for sizes in layouts:
        ours = mesh(rank, world, **sizes)
        theirs.initialize_model_parallel(
            tensor_model_parallel_size=ours.size("tp"),
            pipeline_model_parallel_size=ours.size("pp"),
            context_parallel_size=ours.size("cp"),
            expert_model_parallel_size=ours.size("ep"),
            expert_tensor_parallel_size=ours.size("tp") if ours.grid.expert_tensor else 1,
            num_distributed_optimizer_instances=ours.size("replicate"),
            create_gloo_process_groups=False,
        )
        groups = {
            "pp": theirs.get_pipeline_model_parallel_group(),
            "dp": theirs.get_data_parallel_group(),
            "cp": theirs.get_context_parallel_group(),
            "tp": theirs.get_tensor_model_parallel_group(),
            "dp_cp": theirs.get_data_parallel_group(with_context_parallel=True),
            "shard_cp": theirs.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True),
            "dp_cp_tp": theirs.get_tensor_and_data_parallel_group(with_context_parallel=True),
            "ep": theirs.get_expert_model_parallel_group(),
            "edp": theirs.get_expert_data_parallel_group(),
        }
        found.append({axis: (dist.get_process_group_ranks(g), ours.ranks(axis)) for axis, g in groups.items()})
        for axis, group in groups.items():
            assert ours.rank(axis) == dist.get_rank(group), axis
        theirs.destroy_model_parallel()
    return found


def device_meshes(rank: int, world: int) -> list[Any]:
    """Sub-meshes of replicate 2 x tp 2 and of dp 2 x cp 2: ranks by torch, and the ranks of each of its groups."""
    found: list[Any] = []
    for sizes, axes in (
        ({"replicate": 2, "tp": 2}, ("replicate", "tp")),
        ({"cp": 2}, ("dp", "cp")),
        ({"ep": 2}, ("edp", "ep")),
        ({"pp": 2, "tp": 2}, ("pp", "dp_cp_tp")),
    ):
        ours = mesh(rank, world, **sizes)
        torchs = ours.device_mesh(*axes)
        assert torchs is ours.device_mesh(*axes) and torchs.mesh_dim_names == axes
        found.append((torchs.mesh.tolist(), [members(torchs.get_group(axis)) for axis in axes]))
    return found


def hybrid_shard(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The gradient of a layer that FSDP2 shards over 2 ranks and replicates over 2; by one rank; and the shard's shape."""
    ours = mesh(rank, world, replicate=2)
    torch.manual_seed(0)
    layer, alone = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
    alone.load_state_dict(layer.state_dict())
    x = torch.randn(world, 3)
    fully_shard(layer, mesh=ours.device_mesh("replicate", "shard_cp"))
    layer(x[rank]).square().sum().backward()
    alone(x).square().sum().div(world).backward()
    gradient: Any = layer.weight.grad
    return gradient.full_tensor(), alone.weight.grad, list(gradient.to_local().shape)  # type: ignore[return-value]


def patience(rank: int, world: int) -> float:
    """Seconds that a group waits in a job that waits 77 s."""
    ours = Mesh(MeshConfig(tp=2), Processes(rank, world, rank, CPU, timedelta(seconds=77)))
    group = ours.group("tp")
    assert group is not None
    return float(group._get_backend(CPU).options._timeout.total_seconds())


def hung(rank: int, world: int) -> str:
    """What a rank is told whose neighbour in its tp group never comes; their group waits one second."""
    ours = Mesh(MeshConfig(tp=2), Processes(rank, world, rank, CPU, timedelta(seconds=60)))
    if (group := ours.group("tp")) is not None:  # all four may take their time to form it
        _set_pg_timeout(timedelta(seconds=1), group)
    said = ""
    if ours.rank("tp") == 0:
        try:
            dist.all_reduce(torch.ones(1), group=ours.group("tp"))
        except RuntimeError as error:
            said = str(error)
    dist.barrier()  # the first group, which waits longer: nobody leaves, for that alone would end the wait
    return said
