"""Which ranks see the same near folder, and who keeps whose copy.

A host is here what shares a folder: that is what is lost together. Names of machines would not do; containers have each the
same, or a /dev/shm of their own.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

NAME = "host"


def host_of(folder: Path) -> str:
    """The random word in `folder`, put there by the first who asks. Raises OSError."""
    path = folder / NAME
    if not path.exists():
        temporary = folder / f".{NAME}.{secrets.token_hex(4)}"
        temporary.write_text(secrets.token_hex(8))
        with contextlib.suppress(FileExistsError):  # another rank was faster; a link, because it never replaces
            os.link(temporary, path)
        temporary.unlink()
    return path.read_text()


class Hosts:
    """The hosts of a job; `of[rank]` is the host of each rank."""

    def __init__(self, of: Sequence[str]) -> None:
        self.of = list(of)
        self.members: dict[str, list[int]] = {}  # in the order of their first ranks
        for rank, host in enumerate(self.of):
            self.members.setdefault(host, []).append(rank)

    def buddy(self, rank: int) -> int | None:
        """The rank of the next host that keeps this rank's copy; None when there is one host."""
        if len(self.members) == 1:
            return None
        order = list(self.members)
        there = self.members[order[(order.index(self.of[rank]) + 1) % len(order)]]
        return there[self.members[self.of[rank]].index(rank) % len(there)]

    def leads(self, rank: int) -> bool:
        """Whether this rank does what is done once on a host."""
        return self.members[self.of[rank]][0] == rank

    def worker(self, host: str, number: int) -> int:
        """A rank of the host, another for another number."""
        return self.members[host][number % len(self.members[host])]
