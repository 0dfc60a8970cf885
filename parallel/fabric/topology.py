"""The fabric of a cluster as rules: how fast a collective can be inside a node, between nodes, and how long one takes.

The `fabric:` section of a file in configs/hardware/. Two rules for the inside of a node (arXiv 2511.17127, equation 1): on a full
mesh of links (xGMI) a GPU in a group of n uses its links to the n - 1 others, so small groups are slow; on a switch (NVSwitch)
each GPU has all of its bandwidth in any group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from parallel.config import Strict, guess

_FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    **dict.fromkeys(
        ("reduce_scatter", "all_gather", "all_to_all", "gather", "scatter"), lambda ranks: (ranks - 1) / ranks
    ),
    **dict.fromkeys(("broadcast", "reduce", "send_recv"), lambda ranks: 1.0),
}
OPS = tuple(_FACTORS)


def factor(op: str, ranks: int) -> float:
    """busbw / algbw by the definitions of nccl-tests; S / seconds is algbw, where S is the whole buffer (ranks shards).

    Raises ValueError for an op that is none of OPS.
    """
    if op not in _FACTORS:
        raise ValueError(f"no collective is named {op!r}; {guess(op, list(OPS))}valid names: {', '.join(OPS)}")
    if ranks < 1:
        raise ValueError(f"{op} over {ranks} ranks: a group has at least 1")
    return _FACTORS[op](ranks) if ranks > 1 else 0.0


class XgmiMesh(Strict):
    """Every GPU of a node has one link to every other: a group of n uses n - 1 of them."""

    kind: Literal["xgmi_mesh"] = "xgmi_mesh"
    gpus: int = Field(8, ge=1)
    """GPUs of a node."""
    link_gbs: float = Field(gt=0)
    """GB/s (1e9 bytes) of one link, each direction."""
    efficiency: float = Field(1.0, gt=0, le=1.5)
    """Share of the nominal bandwidth that large collectives reach; above 1 where a switch does part of a reduction itself."""
    hop_us: float = Field(2.0, ge=0)
    """Microseconds that one step of a collective takes at least."""

    def per_gpu(self, ranks: int) -> float:
        """GB/s that a GPU has each way in a group of so many GPUs of its node."""
        return (ranks - 1) * self.link_gbs


class Switch(Strict):
    """Every GPU of a node hangs on one switch, with the same bandwidth whoever it talks to."""

    kind: Literal["switch"] = "switch"
    gpus: int = Field(8, ge=1)
    """GPUs of a node."""
    gpu_gbs: float = Field(gt=0)
    """GB/s (1e9 bytes) between a GPU and the switch, each direction."""
    efficiency: float = Field(1.0, gt=0, le=1.5)
    """Share of the nominal bandwidth that large collectives reach; above 1 where a switch does part of a reduction itself."""
    hop_us: float = Field(2.0, ge=0)
    """Microseconds that one step of a collective takes at least."""

    def per_gpu(self, ranks: int) -> float:
        """GB/s that a GPU has each way in a group of so many GPUs of its node."""
        return self.gpu_gbs


class Network(Strict):
    """What joins the nodes."""

    nics: int = Field(8, ge=1)
    """Network cards of a node for collectives."""
    nic_gbits: float = Field(gt=0)
    """Gbit/s of one card, each direction."""
    rails: bool = True
    """Card i of every node is on network i: what stays on a rail crosses one switch, what changes rails crosses more."""
    efficiency: float = Field(1.0, gt=0, le=1.5)
    """Share of the nominal bandwidth that large messages reach."""
    hop_us: float = Field(5.0, ge=0)
    """Microseconds that one step of a collective between nodes takes at least."""


class Measured(Strict):
    """What a benchmark found for one op in groups of one shape: seconds = alpha + S * factor / busbw."""

    op: str
    ranks: int = Field(ge=2)
    ranks_in_node: int = Field(ge=1)
    alpha_us: float = Field(ge=0)
    busbw_gbs: float = Field(gt=0)


class Fabric(Strict):
    """Bandwidths are nominal, in GB/s (1e9 bytes) each direction."""

    node: Annotated[XgmiMesh | Switch, Field(discriminator="kind")]
    network: Network | None = None
    """None: nodes are not joined."""
    launch_us: float = Field(10.0, ge=0)
    """Microseconds that any collective takes before its first step."""
    measured: list[Measured] = Field(default_factory=list)
    """Takes the place of the rules for the groups that it names."""

    @model_validator(mode="after")
    def _known_ops(self) -> Fabric:
        for curve in self.measured:
            factor(curve.op, curve.ranks)
        return self

    def seconds(self, op: str, bytes: float, ranks: int, ranks_in_node: int) -> float:
        """How long one collective takes, alone, on GPUs that all arrive at once.

        bytes: S by the convention of nccl-tests: the whole buffer, also of reduce_scatter, all_gather and all_to_all (ranks
        shards). ranks_in_node: how many of the group share a node. Raises ValueError as `ceiling` does.
        """
        if ranks == 1:
            factor(op, ranks)
            return 0.0
        nodes = self._nodes(op, ranks, ranks_in_node)
        for curve in self.measured:
            if (curve.op, curve.ranks, curve.ranks_in_node) == (op, ranks, min(ranks, ranks_in_node)):
                return 1e-6 * curve.alpha_us + bytes * factor(op, ranks) / (1e9 * curve.busbw_gbs)
        bandwidth = self._busbw(op, ranks, ranks_in_node, real=True)
        hops, far_hops = _hops(op, min(ranks, ranks_in_node), nodes)
        far = 0.0 if self.network is None else self.network.hop_us
        latency = self.launch_us + hops * self.node.hop_us + far_hops * far
        return 1e-6 * latency + bytes * factor(op, ranks) / (1e9 * bandwidth)

    def ceiling(self, op: str, ranks: int, ranks_in_node: int) -> float:
        """The busbw, GB/s, that no ring over this group can exceed (inf for one rank).

        A group that spans nodes goes through the node first and then along the rails: its k GPUs of a node have k cards, so a
        ring collective has min(bandwidth of a GPU inside, k * card). In an all_to_all every GPU sends most of its data over its
        own card. Reductions in the switch, and trees over two nodes, can show more: busbw assumes a ring. Raises ValueError for
        an unknown op, for more ranks in a node than it has GPUs, and for groups that span nodes where there is no network.
        """
        if ranks == 1:
            factor(op, ranks)
            return math.inf
        return self._busbw(op, ranks, ranks_in_node, real=False)

    def _busbw(self, op: str, ranks: int, ranks_in_node: int, real: bool) -> float:
        """GB/s; real: times the efficiencies."""
        nodes = self._nodes(op, ranks, ranks_in_node)
        near = min(ranks, ranks_in_node)
        inside = self.node.per_gpu(near) * (self.node.efficiency if real else 1.0)
        if nodes == 1:
            return inside
        assert self.network is not None
        # All GPUs of a node run the same program at the same time: where there are fewer cards than GPUs they share them.
        card = self.network.nic_gbits / 8 * (self.network.efficiency if real else 1.0)
        card *= min(1.0, self.network.nics / self.node.gpus)
        if op in ("all_to_all", "gather", "scatter"):
            slowest = max((ranks - near) / card, 0.0 if near == 1 else (near - 1) / inside)  # for a shard of one byte
            return (ranks - 1) / slowest
        if op == "send_recv" or near == 1:
            return card
        return min(inside, near * card)

    def _nodes(self, op: str, ranks: int, ranks_in_node: int) -> int:
        factor(op, ranks)
        if ranks_in_node < 1:
            raise ValueError(f"{op}: {ranks_in_node} ranks in a node; a group has at least 1 in each of its nodes")
        nodes = math.ceil(ranks / ranks_in_node)
        if min(ranks, ranks_in_node) > self.node.gpus:
            raise ValueError(
                f"{op}: {min(ranks, ranks_in_node)} ranks in a node, but fabric.node.gpus is {self.node.gpus}; spread the "
                "group over more nodes or mend the hardware file"
            )
        if nodes > 1 and self.network is None:
            raise ValueError(
                f"{op} over {ranks} ranks with {ranks_in_node} in a node needs a network, and the hardware file's fabric has "
                "none; add fabric.network, or keep the group inside a node"
            )
        return nodes


def _hops(op: str, near: int, nodes: int) -> tuple[int, int]:
    """Steps one after the other, inside a node and between nodes, of a small message: rings inside, and between nodes a tree
    where the op has one."""
    tree = math.ceil(math.log2(nodes)) if nodes > 1 else 0
    if op == "all_reduce":
        return 2 * (near - 1), 2 * tree
    if op in ("broadcast", "reduce"):
        return near - 1, tree
    if op in ("all_to_all", "gather", "scatter", "send_recv"):  # all partners at once
        return min(1, near - 1), min(1, nodes - 1)
    return near - 1, nodes - 1
