"""All checks in the order of the table, and choosing among them by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from launch.preflight import (
    clock,
    compute,
    devices,
    disk,
    environment,
    host,
    kernel_log,
    network,
    packages,
    torch_check,
)
from launch.preflight.check import Check

CHECKS: tuple[Check, ...] = (
    *devices.CHECKS, *torch_check.CHECKS, *compute.CHECKS, *kernel_log.CHECKS, *host.CHECKS, *network.CHECKS,
    *disk.CHECKS, *clock.CHECKS, *environment.CHECKS, *packages.CHECKS,
)  # fmt: skip
# Found out by several ranks together (peers.py), so they have no function of one node.
PEERS = {
    "peer_nodes": "with --peers: what should be the same on all nodes (GPUs, drivers, versions, variables) and is not",
    "peer_clock": "with --peers: skew between the clocks of the nodes",
    "peer_links": "with --peers: every pair of ranks sends to each other; slow links and slow ranks by name",
}


def choose(only: Sequence[str], skip: Sequence[str], peers: bool) -> list[str]:
    """Names of the checks to run, in the order of the table. only: empty for all.

    Raises ValueError for a name that is none, with those that are, the likeliest first.
    """
    names = [check.name for check in CHECKS] + list(PEERS)
    for name in (*only, *skip):
        if name not in names:
            nearest = sorted(names, key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())
            raise ValueError(f"there is no check {name!r}; there are: {', '.join(nearest)}")
        if name in PEERS and name in only and not peers:
            raise ValueError(f"{name} needs --peers, under torchrun")
    chosen = [
        name for name in names if (not only or name in only) and name not in skip and (peers or name not in PEERS)
    ]
    if not chosen:
        raise ValueError("--only and --skip leave no check to run")
    return chosen
