"""A pipeline's schedule in numbers: micro-batches whose activations a rank keeps at once, and the time it stands idle."""

from __future__ import annotations

from collections import Counter

from parallel.grid import MeshConfig


def in_flight(mesh: MeshConfig, rank: int, micro_batches: int) -> list[int]:
    """For each stage of a pipeline rank, in order: micro-batches between their forward and their backward pass, when most are.

    As torch's schedules do it (torch/distributed/pipelining/schedules.py).
    """
    ranks = mesh.pp
    if mesh.pp_schedule == "1f1b":
        return [min(micro_batches, ranks - rank)]
    if mesh.pp_schedule == "zbv":
        return [min(micro_batches, 2 * ranks - rank), min(micro_batches, max(1, rank))]
    stages = mesh.pp_virtual or 2
    a_round = micro_batches // max(1, micro_batches // ranks)
    warm_up = min((stages - 1) * a_round + 2 * (ranks - 1 - rank), micro_batches * stages)
    forwards = min(warm_up + 1, micro_batches * stages)
    count = Counter((step // a_round) % stages for step in range(forwards))
    return [count[stage] for stage in range(stages)]


def bubble(mesh: MeshConfig, micro_batches: int) -> float:
    """Share of a step that a rank stands idle, where all stages take equally long and a backward pass takes two forward passes.

    1f1b: p - 1 of m + p - 1 slots; interleaved: a v-th of that (Narayanan et al. 2021, arXiv 2104.04473). zbv: a rank waits
    p - 1 times for a chunk's forward pass and input gradients less two weight gradients, which is nothing when all three
    take equally long and there are 2 p micro-batches (Qi et al. 2024, arXiv 2401.10241); with fewer, it is like interleaving two.
    """
    ranks, stages = mesh.pp, mesh.pp_virtual or (1 if mesh.pp_schedule == "1f1b" else 2)
    if ranks == 1 or (mesh.pp_schedule == "zbv" and micro_batches >= 2 * ranks):
        return 0.0
    return (ranks - 1) / (micro_batches * stages + ranks - 1)
