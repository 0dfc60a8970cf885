"""Rank functions of test_replicas.py."""

from __future__ import annotations

import torch

from parallel.processes import Processes
from parallel.replicas import Replicas, fingerprint


def processes(rank: int, world: int) -> Processes:
    return Processes(rank, world, rank, torch.device("cpu"))


def every_bit(rank: int, world: int) -> tuple[float, int, set[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
    """Flips each bit of a small replicated tensor on each rank in turn, beside one that is this rank's alone."""
    tensors = {
        "model/shared": torch.tensor([0.0, -1.5, 3e-39]),
        f"model/of rank {rank}": torch.full((9,), float(rank)),
        "optimizer/shared/step": torch.tensor(4.0),
        "model/flag": torch.tensor([True, False]),
    }
    replicas = Replicas(tensors, processes(rank, world))
    found = set()
    assert replicas.check(tensors) == []
    missed = 0
    for victim in range(world):
        for element in range(3):
            for bit in range(32):
                words = tensors["model/shared"].view(torch.int32)
                if rank == victim:
                    words[element] ^= 1 << bit if bit < 31 else -(1 << 31)
                differences = replicas.check(tensors)
                missed += len(differences) != 1 or victim not in differences[0].odd
                found |= {(one.name, tuple(one.holders), tuple(one.odd)) for one in differences}
                if rank == victim:
                    words[element] ^= 1 << bit if bit < 31 else -(1 << 31)
    assert replicas.check(tensors) == []
    return replicas.covered, missed, found


def on_a_gpu_the_sum(values: torch.Tensor) -> int:
    """What `fingerprint` computes of a tensor on a device, computed here."""
    return int(
        values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]).sum()
    )


def only_some(rank: int, world: int) -> list[tuple[str, list[int], list[int]]]:
    """Ranks 0 and 1 hold one block of a tensor, 2 and 3 the other: as DTensors do over two axes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2))
    whole = distribute_tensor(torch.arange(8.0).view(4, 2), mesh, [Shard(0), Replicate()])
    alone = distribute_tensor(torch.arange(8.0), mesh, [Shard(0), Shard(0)])
    tensors: dict[str, torch.Tensor] = {"model/alone": alone, "model/pairs": whole}
    replicas = Replicas(tensors, processes(rank, world))
    assert replicas.covered == 0.5 * 8 / (0.5 * 8 + 2)  # bytes of all ranks: 4 x 16 of pairs, 4 x 8 of the other
    if rank == 3:
        whole.to_local()[0, 0] += 1
        alone.to_local()[0] += 1  # has no second witness
    return [tuple(one) for one in replicas.check(tensors)]  # type: ignore[misc]


def hashes() -> list[int]:
    return [int(fingerprint(torch.zeros(n))) for n in (0, 1, 2)]
