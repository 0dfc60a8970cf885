"""When a checkpoint counts: reserve, write, commit, publish, prune.

A save goes to a fresh hidden folder; it becomes a checkpoint by one rename, after all its bytes are on disk and
`meta.json` has listed them. So at every instant a reader, or the next job after a kill or a power cut, finds complete
checkpoints and leftovers, never a mixture. Older checkpoints are removed only after a newer one has been committed.

Every call is collective unless it says otherwise: all ranks make it, and all return the same or raise the same.
"""

from __future__ import annotations

import builtins
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint import folder as on_disk
from pretrain.checkpoint import points, storage
from pretrain.checkpoint.agreement import Agreement
from pretrain.checkpoint.durable import fsync_folder, make_folder, write_new, write_text
from pretrain.checkpoint.errors import CheckpointError, NoLoadableCheckpoint
from pretrain.checkpoint.folder import INDEX, Entry
from pretrain.checkpoint.sealed import seal, sealed

State = dict[str, Tensor]


@dataclass(frozen=True)
class Resumed:
    """What `Checkpoints.resume` found. per_rank is None if the checkpoint was written by another number of ranks."""

    path: Path
    step: int
    meta: dict[str, Any]
    per_rank: State | None


class Checkpoints:
    """The checkpoints in one folder, for one training job.

    folder: created at the first save; on a filesystem that every rank sees.
    keep: how many of the newest to keep; None keeps all. keep_every: steps divisible by this are kept for good; 0 is
    none. strict: refuse (NoLoadableCheckpoint) instead of going back when the newest checkpoint is damaged. agreement:
    which ranks decide together; by default all, over a gloo group of their own (collective). report: gets one line for
    what a person should know (a skipped checkpoint, a failed deletion); called on one rank.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int | None = 3,
        keep_every: int = 0,
        strict: bool = False,
        agreement: Agreement | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1, or None to keep every checkpoint; got {keep}")
        if keep_every < 0:
            raise ValueError(f"keep_every must be a number of steps, or 0 for none; got {keep_every}")
        self.folder = Path(folder)
        self.keep = keep
        self.keep_every = keep_every
        self.strict = strict
        self.report = report
        self._skipped: set[str] = set()  # lines about skipped checkpoints; each is said once
        self.agreement = agreement or Agreement()
        self.committed = 0  # the sequence of the newest checkpoint that was committed here; known to the coordinator

    # ------------------------------------------------------------------------------------------------------- writing

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        per_rank: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write and commit a checkpoint of `step`; return its folder.

        tensors: as in storage.write. meta: what JSON can hold; the coordinator's counts. per_rank: tensors of which
        every rank has its own, such as random number generator states (on the CPU or a device). Raises CheckpointError
        on every rank if any rank failed: then nothing is left behind and earlier checkpoints stand. A save of a step
        that exists is committed beside the old one before the old one is removed. If a rank dies, the others raise
        what torch.distributed raises; the leftovers are swept by the next job.
        """
        own = {f"rank/{self.agreement.rank}/{name}": tensor for name, tensor in (per_rank or {}).items()}
        fresh = self.agreement.decide(f"saving step {step}", lambda: self._reserve(step, tensors, meta))
        try:
            files = storage.write(fresh, {**tensors, **own}, self.agreement)
            doing = f"committing step {step}"
            final = self.agreement.decide(doing, lambda: self._commit(step, fresh, files, meta, sorted(per_rank or {})))
        except CheckpointError:
            # Every rank has come here, so nobody is writing any more.
            self.agreement.decide("removing a failed save", lambda: self._try(lambda: self._remove(fresh)))
            raise
        self.agreement.decide("publishing", lambda: self._publish(final))
        return final

    def _reserve(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
        if any(name.startswith("rank/") for name in tensors):
            raise ValueError(
                "tensor names that begin with 'rank/' are reserved for per-rank state: pass it as per_rank"
            )
        try:
            json.dumps(dict(meta))
        except TypeError as error:
            raise ValueError(f"meta must be what JSON can hold: {error}") from error
        make_folder(self.folder)
        fresh = self.folder / f".{on_disk.checkpoint_name(step)}.{secrets.token_hex(4)}.partial"
        fresh.mkdir()
        points.reached("reserved")
        return fresh

    def _commit(
        self, step: int, fresh: Path, files: dict[str, int], meta: Mapping[str, Any], per_rank: builtins.list[str]
    ) -> Path:
        for name, size in files.items():
            # If the folder is not shared between nodes, each node has written its shards to a disk of its own.
            path = fresh / name
            if not path.exists() or path.stat().st_size != size:
                raise CheckpointError(f"{path} is not as it was written: do all ranks see the same {self.folder}?")
        previous = on_disk.entries(self.folder)
        attempts = [entry.attempt for entry in previous if entry.step == step]
        record: dict[str, Any] = {
            "format": on_disk.FORMAT,
            "step": step,
            "sequence": 1 + max((entry.sequence for entry in previous), default=0),
            "world": self.agreement.world,
            "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "files": files,
            "index": seal(fresh / INDEX),
            "per_rank": per_rank,
            "meta": dict(meta),
        }
        write_new(fresh / on_disk.META, sealed(record))
        fsync_folder(fresh)
        points.reached("manifest")
        final = self.folder / on_disk.checkpoint_name(step, 1 + max(attempts, default=0))
        fresh.rename(final)
        try:
            points.reached("renamed")
            fsync_folder(self.folder)
            self.committed = record["sequence"]
        except OSError:
            # It may or may not survive a power cut, and the caller hears that it failed: take it back.
            self._try(lambda: self._remove(final))
            raise
        return final

    def _publish(self, final: Path) -> None:
        """The checkpoint counts already: what fails from here on is reported, not raised."""
        self._try(lambda: write_text(self.folder / on_disk.LATEST, final.name + "\n"))
        points.reached("published")
        self._prune()

    def _prune(self) -> None:
        found = on_disk.entries(self.folder)
        good = [entry for entry in found if not entry.fault]
        supersedes: dict[int, Path] = {}
        for entry in good:
            supersedes.setdefault(entry.step, entry.path)
        oldest_kept = good[: self.keep][-1].sequence if good else 0
        for entry in found:
            superseded = supersedes.get(entry.step, entry.path) != entry.path
            permanent = self.keep is None or (self.keep_every > 0 and entry.step % self.keep_every == 0)
            if superseded or (not permanent and entry.record and entry.sequence < oldest_kept):
                self._try(partial(self._remove, entry.path))

    def _try(self, function: Callable[[], None]) -> None:
        try:
            function()
        except OSError as error:
            self.report(f"in {self.folder}: {error}")

    def _remove(self, path: Path) -> None:
        """Delete a folder such that a kill half-way leaves a leftover and never a damaged checkpoint."""
        if not path.exists():
            return
        if path.name.startswith("."):
            trash = path
        else:
            trash = path.with_name(f".{path.name}.{secrets.token_hex(4)}.trash")
            path.rename(trash)
            fsync_folder(path.parent)
        points.reached("pruning")
        shutil.rmtree(trash)

    def sweep(self) -> None:
        """Remove what dead jobs left half-done. Only for the job that holds the lease on the run folder."""

        def sweep() -> None:
            for path in on_disk.leftovers(self.folder):
                self.report(f"removing {path}, left by a job that ended in the middle of it")
                self._try(partial(shutil.rmtree, path))

        self.agreement.decide("sweeping", sweep)

    # ------------------------------------------------------------------------------------------------------- reading

    def list(self) -> list[Entry]:
        """Every checkpoint, complete or not, newest first."""
        return self.agreement.decide("listing", lambda: on_disk.entries(self.folder))

    def newest(self) -> Path | None:
        """The newest complete checkpoint; None if there never was one. NoLoadableCheckpoint if all are damaged."""
        found = self._loadable()
        return found[0].path if found else None

    def _loadable(self) -> builtins.list[Entry]:
        return self.agreement.decide(
            "looking for checkpoints", lambda: on_disk.loadable(self.folder, self._skip, self.strict)
        )

    def _skip(self, line: str) -> None:
        if line not in self._skipped:
            self._skipped.add(line)
            self.report(line)

    def meta(self, path: Path) -> dict[str, Any]:
        """The `meta` given to `save`."""
        return self.agreement.decide(f"reading {path}", lambda: _complete(path).record["meta"])

    def load(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors` in place from the checkpoint at `path`: whole sections, as storage.read says.

        Raises ValueError if they do not fit, CheckpointError if the checkpoint is damaged.
        """
        self.agreement.decide(f"reading {path}", lambda: _complete(path))
        storage.read(path, tensors, self.agreement)

    def load_per_rank(self, path: Path) -> State | None:
        """What this rank gave to `save` as per_rank, on the CPU; {} if it gave nothing.

        None, and a line to `report`, if another number of ranks wrote the checkpoint: seed anew then.
        """
        record = self.agreement.decide(f"reading {path}", lambda: _complete(path).record)
        if not record["per_rank"]:
            return {}
        if record["world"] != self.agreement.world:
            if self.agreement.coordinator:
                self.report(
                    f"{path} was written by {record['world']} ranks and is read by {self.agreement.world}: "
                    f"the state of each rank ({', '.join(record['per_rank'])}) starts anew"
                )
            return None
        prefix = f"rank/{self.agreement.rank}/"
        own: State = {}

        def allocate() -> None:
            for name, spec in storage.contents(path).items():
                if name.startswith(prefix):
                    own[name] = torch.empty(spec.shape, dtype=spec.dtype)

        self.agreement.everyone(f"reading {path}", allocate)
        storage.read(path, own, self.agreement)
        return {name.removeprefix(prefix): tensor for name, tensor in own.items()}

    def resume(
        self,
        tensors: Mapping[str, Tensor],
        check: Callable[[dict[str, Any]], None] | None = None,
        at_most: int | None = None,
    ) -> Resumed | None:
        """Load the newest checkpoint that can be read into `tensors`; None if there never was one.

        at_most: only those of this step or an earlier one are looked at.
        check: called with the checkpoint's `meta` before anything is read; raises ValueError to refuse. A checkpoint
        that is refused, or does not fit, ends the call with ValueError; a damaged one is skipped with a line to
        `report` and the one before it is tried. Raises NoLoadableCheckpoint if none is left, or if strict forbids that.
        """
        candidates = [entry for entry in self._loadable() if at_most is None or entry.step <= at_most]
        for entry in candidates:
            if check is not None:
                self.agreement.everyone(f"checking {entry.path}", partial(check, entry.record["meta"]))
            try:
                self.load(entry.path, tensors)
                own = self.load_per_rank(entry.path)
            except CheckpointError as error:
                # The folder is named once.
                fault = str(error).removeprefix(f"reading {entry.path}: ").replace(f"{entry.path}/", "")
                if self.strict:
                    raise on_disk.refused(entry.path, fault) from error
                if self.agreement.coordinator:
                    self._skip(f"skipping checkpoint {entry.path}: {fault}")
                continue
            return Resumed(entry.path, entry.step, entry.record["meta"], own)
        if candidates:
            raise NoLoadableCheckpoint(
                f"none of the {len(candidates)} complete checkpoints in {self.folder} can be read. "
                "Restore one from a copy, or start another run folder."
            )
        return None


def _complete(path: Path) -> Entry:
    entry = on_disk.inspect(path)
    if entry is None:
        raise ValueError(f"{path} is not a checkpoint (a folder named like {on_disk.checkpoint_name(100)})")
    if entry.fault:
        raise CheckpointError(f"{path}: {entry.fault}")
    return entry
