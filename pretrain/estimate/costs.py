"""What an estimate consists of: plain numbers, all of them counts of bytes, FLOPs or calls, none of them seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Collective:
    """One kind of message that a rank takes part in during a step.

    axis: of the process grid (parallel/grid.py), or "world". op: all_reduce, reduce_scatter, all_gather, all_to_all, broadcast,
    send_recv. what: for people. bytes: S of one call by the convention of nccl-tests: the whole buffer that a rank reduces, the
    gathered one of an all_gather, the unscattered one of a reduce_scatter, all that a rank sends in an all_to_all (its own share
    included), the message of a send_recv. calls: a step. ranks: of the group; ranks_in_node: how many of these share a node.
    hidden: computation may go on beside it.
    """

    axis: str
    op: str
    what: str
    bytes: float
    calls: float
    ranks: int
    ranks_in_node: int
    hidden: bool

    @property
    def total(self) -> float:
        """Bytes a step."""
        return self.bytes * self.calls


@dataclass(frozen=True)
class Matmul:
    """A kind of matrix product [m, k] x [k, n] of the forward pass on one rank; its backward has two of the same work.

    m: rows, a mean where it is a number of tokens an expert gets. calls: a step, over all layers and micro-batches.
    """

    what: str
    m: float
    n: int
    k: int
    calls: float

    @property
    def flops(self) -> float:
        """Of one call: 2 per multiply-add."""
        return 2.0 * self.m * self.n * self.k


@dataclass(frozen=True)
class _Costs:
    """parameters: elements held between steps. weights, gradients, optimizer: bytes of state. activations: bytes that forward
    passes keep for backward passes, at the moment when most are kept. buffers: what else is there at the peak (gathered
    parameters, communication buffers, logits, gradients in flight). peak: the sum of these. flops: useful ones, forward and
    backward; on top of them recomputed: those of activation checkpointing; remade: of fused backward passes; update: of the
    optimizer's products (flops.py).
    """

    parameters: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    peak: float
    flops: float
    recomputed: float
    remade: float
    update: float
    matmuls: tuple[Matmul, ...]
    collectives: tuple[Collective, ...]

    @property
    def hardware_flops(self) -> float:
        """All that a device computes in a step."""
        return self.flops + self.recomputed + self.remade + self.update


@dataclass(frozen=True)
class StageCosts(_Costs):
    """One pipeline rank. layers: numbers of the layers it holds."""

    layers: tuple[int, ...]


@dataclass(frozen=True)
class RankCosts(_Costs):
    """A step on one rank. Bytes are those of the rank with the highest peak, work and messages of the rank with the most work.

    bubble: idle share of the step in a pipeline whose stages take equally long. stages: each pipeline rank by itself, in order;
    one without a pipeline.
    """

    bubble: float
    stages: tuple[StageCosts, ...]
    micro_batches: int
    tokens: int
    """Of one micro-batch on one rank, that the mixers of this rank see (after cp, before tp)."""
