"""The process grid as one picture, and its configuration.

Today the grid has one axis, dp (data parallel): every rank holds a share of the batch, and the engine decides how parameters and
optimizer state are spread over it.
"""

from __future__ import annotations

from pydantic import Field
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.config import Strict
from parallel.processes import Processes


class MeshConfig(Strict):
    """Sizes of the mesh axes; their product is the number of ranks."""

    dp: int | None = Field(None, ge=1)
    """Data-parallel ranks; all ranks when left out."""


class Mesh:
    """The grid of one job. `dp` is the device mesh of the data-parallel axis, or None for a single rank."""

    def __init__(self, config: MeshConfig, processes: Processes):
        size = config.dp or processes.world
        if size != processes.world:
            raise ValueError(
                f"mesh.dp={size}, but the launcher started {processes.world} rank(s); "
                f"start {size} ranks, or leave mesh.dp out to use all of them"
            )
        self.processes = processes
        self.dp_size = size
        self.dp: DeviceMesh | None = None
        if size > 1:
            self.dp = init_device_mesh(processes.device.type, (size,), mesh_dim_names=("dp",))

    @property
    def dp_rank(self) -> int:
        return self.processes.rank

    def picture(self) -> str:
        """The grid in words, for the start of a run."""
        return f"dp {self.dp_size} = {self.dp_size} rank(s) on {self.processes.device.type}"
