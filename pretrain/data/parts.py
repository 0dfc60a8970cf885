"""The folder of finished units beside the output: `OUTPUT.parts/`.

record.json states the settings, plan.json the units, units/KEY/ holds a finished one: it is written under another name
and renamed, so what has the name is complete whatever was killed when. Several processes and machines may fill one
folder, or each its own, to be merged.

A unit is one or more runs, each sorted by the documents' keys (a hash of their content and the seed): NNNN.table one row
a document, NNNN.tokens their token ids end to end, NNNN.text the text of those that are held out, NNNN.signatures for
near-duplicates.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pretrain.data.errors import DataError, PrepareFailure, UsageError
from pretrain.data.units import Unit

TABLE = np.dtype(
    [
        ("key", "<u8"),  # the place in the shuffled order
        ("high", "<u8"),  # of the document's xxh3_128
        ("low", "<u8"),
        ("bytes", "<u8"),  # of text
        ("place", "<u4"),  # among the documents of the unit
        ("tokens", "<u4"),
        ("flags", "u1"),
    ]
)
VALIDATION, LOSSY = 1, 2
VERSION = 1
RECORD, PLAN, UNITS = "record.json", "plan.json", "units"
_FREE = ("on_bad",)  # settings that may change between runs: a unit that dropped nothing is the same under both


def folder_of(output: Path) -> Path:
    """Where the units of an output are kept until they are merged."""
    return output.with_name(output.name + ".parts")


@dataclass(frozen=True)
class RunRecord:
    """One run: documents, bytes of its files by kind, and their xxh3_64 in hexadecimal."""

    documents: int
    bytes: dict[str, int]
    hashes: dict[str, str]


@dataclass(frozen=True)
class UnitRecord:
    """What a finished unit holds. dropped: how many documents were left out, by reason. notes: the first few of them.
    stamp: see Unit.stamp."""

    key: str
    stamp: str
    bytes: int
    dropped: dict[str, int]
    notes: list[str] = field(default_factory=list)
    runs: list[RunRecord] = field(default_factory=list)


class Parts:
    """The folder. settings: what decides the content of units; equal for all that share the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's file."""
        return self.folder / "tokenizer.model"

    def unit_folder(self, key: str) -> Path:
        """Where a finished unit lies."""
        return self.folder / UNITS / key

    def record(self) -> dict[str, Any] | None:
        """The record of settings, None if there is none. Raises DataError if it is damaged."""
        return self._read(RECORD)

    def plan(self) -> dict[str, Any]:
        """files: how many. units: in their order, each with its key, name and size. Raises DataError if missing or
        damaged.
        """
        found = self._read(PLAN)
        if found is None:
            raise DataError(f"{self.folder} has no {PLAN}; run `python -m pretrain.data prepare` of its output again")
        return dict(found)

    def _read(self, name: str) -> Any:
        path = self.folder / name
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is damaged ({error}); remove {self.folder} and prepare again") from None
        if found.get("format") != "braid-parts" or found.get("version") != VERSION:
            raise DataError(f"{path} is of another version; remove {self.folder} and prepare again")
        return found

    def _write(self, name: str, content: dict[str, Any]) -> None:
        write_whole(self.folder / name, json.dumps({"format": "braid-parts", "version": VERSION, **content}, indent=1))

    def begin(self, settings: dict[str, Any], tokenizer: str) -> None:
        """Writes the record. Raises ValueError if units of other settings, or of another tokenizer (named by its hash),
        are there already.
        """
        self.require(settings)
        found = self.record()
        if found is not None and found["tokenizer"] != tokenizer:
            raise UsageError(
                f"{self.folder} holds units that were encoded with another tokenizer (xxh3_128 {found['tokenizer']}, now "
                f"{tokenizer}): use that one, name another `--output`, or pass `--restart` to discard them"
            )
        self._write(RECORD, {"settings": settings, "tokenizer": tokenizer})

    def require(self, settings: dict[str, Any]) -> None:
        """Raises ValueError, saying what differs, if units of other settings are there already."""
        found = self.record()
        if found is None:
            return
        differing = differences(found["settings"], settings)
        if differing:
            raise UsageError(
                f"{self.folder} holds units of other settings ({'; '.join(differing)}): go on with those, name another "
                "`--output`, or pass `--restart` to discard them"
            )

    def write_plan(self, units: Sequence[Unit], files: int) -> None:
        """States the units in their order, and of how many files they are."""
        self._write(
            PLAN, {"files": files, "units": [{"key": unit.key, "name": unit.name, "size": unit.size} for unit in units]}
        )

    def finished(self, key: str) -> UnitRecord | None:
        """The record of a finished unit; None if it is not there, or its files are not of the sizes recorded."""
        folder = self.unit_folder(key)
        try:
            found = json.loads((folder / RECORD).read_text())
            record = UnitRecord(**{**found, "runs": [RunRecord(**run) for run in found["runs"]]})
            for number, run in enumerate(record.runs):
                if any(run_file(folder, number, kind).stat().st_size != size for kind, size in run.bytes.items()):
                    return None
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return record

    @contextlib.contextmanager
    def unit(self, key: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yields a folder to write a unit to, and a dictionary for its record; commits it when the block ends."""
        (self.folder / UNITS).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{key}.", suffix=".partial", dir=self.folder / UNITS))
        try:
            content: dict[str, Any] = {}
            yield folder, content
            (folder / RECORD).write_text(json.dumps(asdict(UnitRecord(key=key, **content))))
            for path in folder.iterdir():
                sync(path)
            sync(folder)
            umask = os.umask(0)
            os.umask(umask)
            folder.chmod(0o777 & ~umask)  # mkdtemp makes it private; whoever merges may be another user
            final = self.unit_folder(key)
            shutil.rmtree(final, ignore_errors=True)  # of files that have changed since, or damaged
            with contextlib.suppress(OSError):  # another process was quicker, with the same bytes
                folder.rename(final)
            sync(final.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def locked(self, name: str = "") -> Iterator[None]:
        """Holds the lock of this name; with none, all that there are. A killed process's lock died with it.

        Raises PrepareFailure if another process holds one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [self.folder / f"{name}.lock"] if name else sorted(self.folder.glob("*.lock"))
        with contextlib.ExitStack() as closing:
            for path in names:
                stream = closing.enter_context(path.open("wb"))
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise PrepareFailure(
                        f"another process is at work in {self.folder} ({path.stem}); wait for it"
                    ) from None
                except OSError:  # some network file systems have no locks
                    pass
            yield

    def count(self) -> int:
        """Finished units."""
        return sum(not path.suffix for path in (self.folder / UNITS).glob("*"))

    def tidy(self, keys: Sequence[str]) -> None:
        """Removes what killed processes left of these units."""
        wanted = set(keys)
        for path in (self.folder / UNITS).glob("*.partial"):
            if path.name.split(".")[0] in wanted:
                shutil.rmtree(path, ignore_errors=True)

    def discard(self) -> None:
        """Removes everything. The record goes last: killed on the way, the next run still knows what this was."""
        shutil.rmtree(self.folder / UNITS, ignore_errors=True)
        for path in self.folder.glob("*"):
            if path.name not in (RECORD, PLAN):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        (self.folder / PLAN).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two records of settings, for people: `seed was 0, is 1`."""
    names = [name for name in {**before, **now} if name not in _FREE]
    return [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(names)
        if json.dumps(before.get(name), sort_keys=True) != json.dumps(now.get(name), sort_keys=True)
    ]


def run_file(folder: Path, run: int, kind: str) -> Path:
    """A file of a unit: table, tokens, text or signatures of its run number `run`."""
    return folder / f"{run:04}.{kind}"


def write_run(folder: Path, run: int, files: dict[str, bytes], documents: int) -> RunRecord:
    """Writes the files of a run, by kind."""
    for kind, content in files.items():
        run_file(folder, run, kind).write_bytes(content)
    sizes = {kind: len(content) for kind, content in files.items()}
    return RunRecord(documents, sizes, {kind: xxhash.xxh3_64_hexdigest(content) for kind, content in files.items()})


def write_whole(path: Path, content: str) -> None:
    """Writes a small file so that it is there entirely or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(content)
    sync(partial)
    partial.replace(path)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
