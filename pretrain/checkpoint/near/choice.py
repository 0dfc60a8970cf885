"""Which near save may be resumed from, judged by what was found on all hosts. No files, no ranks: only the rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pretrain.checkpoint.folder import Entry
from pretrain.checkpoint.near.parts import Part, Save


@dataclass
class Found:
    """One save: for each rank's part, the hosts that have it."""

    save: Save
    holders: dict[int, list[str]] = field(default_factory=dict)
    blocks: dict[int, str] = field(default_factory=dict)

    @property
    def lost(self) -> list[int]:
        """The ranks whose parts are on no host."""
        return [rank for rank in range(self.save.world) if rank not in self.holders]


def gathered(of_hosts: Mapping[str, Iterable[Part]]) -> list[Found]:
    """The saves that the hosts' parts belong to, newest first."""
    saves: dict[Save, Found] = {}
    for host, parts in of_hosts.items():
        for part in parts:
            found = saves.setdefault(part.save, Found(part.save))
            found.holders.setdefault(part.rank, []).append(host)
            found.blocks[part.rank] = part.blocks
    return sorted(saves.values(), key=lambda found: found.save.number, reverse=True)


@dataclass(frozen=True)
class Disk:
    """The shared folder: (sequence, step) of the newest complete checkpoint, and the highest sequence that is left of any."""

    newest: tuple[int, int] | None
    highest: int | None

    @staticmethod
    def of(entries: Sequence[Entry]) -> Disk:
        newest = next(((entry.sequence, entry.step) for entry in entries if not entry.fault), None)
        readable = all(entry.record for entry in entries)  # of a damaged one the sequence is not known
        return Disk(newest, max((entry.sequence for entry in entries), default=0) if readable else None)

    def as_new_as(self, save: Save) -> bool:
        """Whether there is nothing to gain from `save`. Newer is what was made later, as among checkpoints; but a checkpoint may
        be committed long after its step, and a save of a later step then came first."""
        return self.newest is not None and save.base < self.newest[0] and save.step <= self.newest[1]


def fault(found: Found, disk: Disk, layout: str, blocks: Sequence[str]) -> str:
    """Why a save cannot be resumed from; "" if it can, as far as one can tell before reading it.

    layout and blocks: the present job's, the latter by rank (see parts.fingerprint).
    """
    save = found.save
    if disk.highest is not None and save.base > disk.highest:
        return "the checkpoint that it came after has been removed"
    if save.layout != layout or save.world != len(blocks):
        return f"it was made by {save.layout}, and this job is {layout}"
    if found.lost:
        ranks = ", ".join(map(str, found.lost[:8]))
        return f"no host has the part of rank {ranks}" + (" and others" if len(found.lost) > 8 else "")
    if any(found.blocks[rank] != each for rank, each in enumerate(blocks)):
        return "its tensors are cut into other blocks than this job's"
    return ""
