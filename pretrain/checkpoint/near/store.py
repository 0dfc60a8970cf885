"""What lies in this host's near folder for one run.

    /dev/shm/braid-1000-quickstart-1f2e3d4c/    of user 1000 and of the run folder with this name and this hash of its path
      host                                      which host this is (hosts.py)
      9c0d.../                                  the run's identity: a run folder that was begun anew has another
        step_00000120.12.ab12cd34/              the twelfth save, of step 120: parts of this host's ranks, and of their buddies'

Nothing outside of that folder is ever touched.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.near.hosts import host_of
from pretrain.checkpoint.near.parts import Part, Save, description, read_description

_SAVE = re.compile(r"step_(\d{8,})\.(\d+)\.([0-9a-f]+)")


class Store:
    """run: the run folder's path as the coordinator sees it. identity: of the run."""

    def __init__(self, folder: Path, run: str, identity: str) -> None:
        digest = hashlib.sha256(run.encode()).hexdigest()[:8]
        self.run = folder / f"braid-{os.getuid()}-{Path(run).name}-{digest}"
        self.identity = identity

    @property
    def root(self) -> Path:
        return self.run / self.identity

    def open(self) -> str:
        """Makes the folder; returns which host it is on. Raises OSError, CheckpointError."""
        self.run.mkdir(mode=0o700, exist_ok=True)  # the state is nobody else's to read
        if self.run.stat().st_uid != os.getuid():
            raise CheckpointError(f"{self.run} belongs to another user")
        self.root.mkdir(exist_ok=True)
        return host_of(self.run)

    def folder_of(self, save: Save) -> Path:
        return self.root / f"step_{save.step:08d}.{save.number}.{save.id}"

    def parts(self) -> list[Part]:
        """Every part whose description is good. One that is not is as good as lost."""
        found = []
        for folder in self._saves():
            for path in sorted(folder.glob("*.json")):
                try:
                    part = read_description(path)[0]
                except CheckpointError:
                    continue
                if self.folder_of(part.save) == folder and description(folder, part.rank) == path:
                    found.append(part)
        return found

    def keep_newest(self, count: int) -> None:
        """Removes all saves but the newest ones."""
        by_number = sorted(self._saves(), key=lambda path: _number(path.name))
        for path in by_number[: max(0, len(by_number) - count)]:
            self._remove(path)

    def keep_only(self, saves: Collection[Save]) -> None:
        """Removes all other saves, and what the run folder's earlier runs have left."""
        kept = {self.folder_of(save) for save in saves}
        for path in self._saves():
            if path not in kept:
                self._remove(path)
        for path in self.run.iterdir():
            if path.is_dir() and path != self.root:
                self._remove(path)

    def remove(self, save: Save) -> None:
        self._remove(self.folder_of(save))

    def clear(self) -> None:
        """Removes everything of this run."""
        self._remove(self.run)

    def _saves(self) -> list[Path]:
        return [path for path in self.root.iterdir() if _SAVE.fullmatch(path.name)]

    def _remove(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)  # what stays takes room, and room is looked at before every save


def _number(name: str) -> int:
    match = _SAVE.fullmatch(name)
    assert match is not None
    return int(match[2])
