"""The process grid with its process groups. The grid itself, as arithmetic, is in grid.py; its picture in drawing.py."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from parallel import drawing
from parallel.grid import AXES, Grid, Limit, MeshConfig, layouts
from parallel.processes import Processes

__all__ = ["AXES", "Grid", "Limit", "Mesh", "MeshConfig", "layouts"]


class Mesh:
    """The grid of one job as this rank sees it. `dp` is the device mesh of the data-parallel axis, None where it has size 1.

    Axes (names in AXES, meaning in grid.py): pp, dp, replicate, shard, cp, tp; ep, edp; dp_cp, shard_cp, dp_cp_tp.
    """

    def __init__(self, config: MeshConfig, processes: Processes):
        """Forms the process groups: collective.

        Raises ValueError, before any group forms, for sizes that do not fit the number of processes.
        """
        self.grid = config.grid(processes.world)
        self.context = config.context
        self.processes = processes
        # All groups are formed here and in one order: a rank that asked for one later, or alone, would leave the others
        # waiting. Axes with the same ranks share a group, and the group of all ranks is the one that exists.
        formed: dict[tuple[int, int], dist.ProcessGroup | None] = {}
        for axis in AXES:
            extent = self.grid.extent(axis)
            if extent[0] > 1 and extent not in formed:
                formed[extent] = _form(self.grid, axis, processes.timeout)
        self._groups = {axis: formed.get(self.grid.extent(axis)) for axis in AXES}
        self._device_meshes: dict[tuple[str, ...], DeviceMesh] = {}
        self.dp: DeviceMesh | None = self.device_mesh("dp") if self.dp_size > 1 else None

    @property
    def dp_rank(self) -> int:
        return self.rank("dp")

    @property
    def dp_size(self) -> int:
        return self.size("dp")

    @property
    def counts_tokens(self) -> bool:
        """Whether this rank counts its batch where tokens are summed over all ranks: cp, tp and pp ranks have the same one.

        Losses need no such care: each rank has its share of them.
        """
        return self.rank("cp") == self.rank("tp") == self.rank("pp") == 0

    def size(self, axis: str) -> int:
        """Ranks in each group of the axis."""
        return self.grid.size(axis)

    def rank(self, axis: str) -> int:
        """This rank's place in its group of the axis."""
        return self.grid.coordinate(axis, self.processes.rank)

    def ranks(self, axis: str) -> list[int]:
        """The (global) ranks of this rank's group of the axis."""
        return self.grid.ranks(axis, self.processes.rank)

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """This rank's process group of the axis, or None where its size is 1: then there is nobody to talk to."""
        self.grid.extent(axis)  # says which axes there are
        return self._groups[axis]

    def device_mesh(self, *axes: str) -> DeviceMesh:
        """The sub-grid of these axes that this rank is part of, for FSDP2 and DTensor, made of the groups that exist.

        axes: outer ones first, as ("replicate", "shard_cp"). Raises ValueError for axes that overlap (tp and ep), and for
        axes of size 1, which have no group.
        """
        if axes not in self._device_meshes:
            ranks = torch.tensor(self.grid.box(axes, self.processes.rank))
            groups = [group for group in map(self.group, axes) if group is not None]
            if len(groups) < len(axes):
                alone = ", ".join(axis for axis in axes if self.size(axis) == 1)
                raise ValueError(f"no device mesh over mesh axes of size 1 ({alone}): leave them out")
            kind = self.processes.device.type
            if len(groups) == 1:  # torch takes a list of groups for more than one axis only
                mesh = DeviceMesh.from_group(groups[0], kind, mesh_dim_names=axes)
            else:
                ranks = ranks.view([self.size(axis) for axis in axes])
                mesh = DeviceMesh.from_group(groups, kind, mesh=ranks, mesh_dim_names=axes)
            self._device_meshes[axes] = mesh
        return self._device_meshes[axes]

    def picture(self) -> str:
        """The grid in one line."""
        return drawing.line(self.grid, f" on {self.processes.device.type}")

    def draw(self) -> str:
        """The grid in lines, for the start of a run: who sits where, on which node, and the groups of this rank."""
        # What the launcher says, if it does: torchrun, srun (launch/slurm.sh) and accelerate, or deepspeed.
        node = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 0) or None
        return drawing.draw(self.grid, self.processes.rank, node, f" on {self.processes.device.type}")


def _form(grid: Grid, axis: str, timeout: timedelta) -> dist.ProcessGroup | None:
    """This rank's group of the axis. Collective over the job, which forms all groups of the axis at once."""
    return form(grid.groups(axis), f"mesh_{axis}", timeout)


def form(groups: list[list[int]], name: str, timeout: timedelta) -> dist.ProcessGroup | None:
    """This rank's group out of `groups`, which hold every rank of the job once. Collective over the job."""
    everyone = dist.group.WORLD
    assert everyone is not None, "join() comes before the mesh"
    if len(groups) == 1:
        return everyone
    if everyone.bound_device_id is not None:
        # NCCL and RCCL split one communicator into all the groups in one call; group by group it would be a call each.
        return dist.split_group(split_ranks=groups, timeout=timeout, group_desc=name)
    group, _ = dist.new_subgroups_by_enumeration(groups, timeout=timeout, group_desc=name)
    return group
