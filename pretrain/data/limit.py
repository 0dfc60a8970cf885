"""How much text the finished units at the beginning of the input hold, so that a limit need not make all of them."""

from __future__ import annotations

import numpy as np

from pretrain.data.parts import TABLE, Parts, run_file
from pretrain.data.units import Unit


class Prefix:
    """Counts distinct documents of the first units, without a gap. limit_bytes: None for no limit.

    Documents are told apart by their 64-bit keys here; should two collide, a unit more is made than is needed.
    """

    def __init__(self, parts: Parts, units: list[Unit], limit_bytes: int | None) -> None:
        self.parts = parts
        self.units = units
        self.left = limit_bytes
        self._at = 0
        self._there: set[int] = set()
        self._known = np.zeros(0, np.uint64)

    def add(self, unit: Unit) -> None:
        """A unit is finished."""
        if self.left is None:
            return
        self._there.add(unit.number)
        while self._at in self._there and self.left > 0:
            self._count(self.units[self._at])
            self._at += 1

    def _count(self, unit: Unit) -> None:
        folder = self.parts.unit_folder(unit.key)
        assert self.left is not None
        for number in range(len(list(folder.glob("*.table")))):
            rows = np.fromfile(run_file(folder, number, "table"), TABLE)
            keys, first = np.unique(rows["key"], return_index=True)
            fresh = ~np.isin(keys, self._known)
            self.left -= int(rows["bytes"][first[fresh]].sum())
            self._known = np.union1d(self._known, keys)

    def wants_more(self) -> bool:
        """Whether the limit is not reached yet."""
        return self.left is None or self.left > 0
