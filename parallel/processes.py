"""The processes of a job: who am I, how many are we, and the few questions that all ranks answer together.

The launchers (torchrun, deepspeed, accelerate, srun through torchrun) all describe the job in the same environment variables:
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Without them the job is this one process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process and its job. `device` is where this rank computes.

    timeout: how long it waits for the others in one operation. Every group of the job's ranks is formed with it: torch gives a
    group that is not told half an hour, whatever the job's first group was told.
    """

    rank: int
    world: int
    local_rank: int
    device: torch.device
    timeout: timedelta = timedelta(minutes=10)

    @property
    def first(self) -> bool:
        """True on the one rank that talks: prints, writes metrics, owns the run folder."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (any picklable object) on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (any picklable object), in the order of ranks, on every rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def sum(self, values: Iterable[float]) -> list[float]:
        """Elementwise sums over ranks, in fp64: the same numbers on every rank."""
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over ranks in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


def join(device: str = "auto", timeout_seconds: float = 600.0, group_for_one: bool = False) -> Processes:
    """Joins the job that the launcher describes.

    device: "cpu", "cuda" (NVIDIA and ROCm alike) or "auto". timeout_seconds: see Processes. group_for_one: make a process group
    even for a single process, for libraries that insist on one.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA or ROCm device; use device=cpu or device=auto")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no device of its own: this node has {torch.cuda.device_count()}; "
            "start fewer processes a node, or use device=cpu"
        )
    where = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(where)
    timeout = timedelta(seconds=timeout_seconds)
    if (world > 1 or group_for_one) and not dist.is_initialized():
        options: dict[str, Any] = {"timeout": timeout}
        if "MASTER_ADDR" not in os.environ:  # a single process without a launcher
            store = tempfile.NamedTemporaryFile(prefix="braid_store_", delete=False)  # noqa: SIM115 (the group keeps it)
            options |= {"store": dist.FileStore(store.name, 1), "rank": 0, "world_size": 1}
        if on_gpu:
            options["device_id"] = where
        dist.init_process_group("nccl" if on_gpu else "gloo", **options)
    return Processes(rank, world, local_rank, where, timeout)


def leave() -> None:
    """Leaves the job. Safe to call twice, or without having joined."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
