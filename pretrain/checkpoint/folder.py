"""What is on disk: the names in a checkpoint folder, which checkpoints are complete, and which is the newest.

    checkpoints/
      step_00000100/              a committed checkpoint: it got this name by a rename, after every byte was on disk
        meta.json                 written last and sealed: step, sequence, files with their sizes, the hash of the index,
                                  and the training loop's own state
        index.json 00000.data 00000.sums   the tensors (planned.py)
      step_00000100.2/            step 100 saved a second time (after a resume); it supersedes the first
      latest                      text: the name of the newest; for people and scripts, nothing here depends on it
      .step_00000200.x1y2.partial a save under way, or one whose job died; swept when the next job starts
      .step_00000050.x1y2.trash   being deleted

Newest means *committed last* (`sequence` in meta.json grows by one with each commit), not the highest step: a run that
went back to an earlier step must go on from there. It is a count and not a time, so clocks do not matter.

These functions only read. They see this machine's view of the disk: in a job, one rank asks and tells the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.checkpoint.errors import NoLoadableCheckpoint
from pretrain.checkpoint.sealed import read_sealed, seal

META = "meta.json"
INDEX = "index.json"
LATEST = "latest"
FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})(?:\.(\d+))?")
_OF_RANK = re.compile(r"(\d{5,})\.(?:data|sums)")
_LEFTOVER = re.compile(r"\.step_.*\.(partial|trash)")


def checkpoint_name(step: int, attempt: int = 1) -> str:
    """step_00000100 for the first save of step 100, step_00000100.2 for the second."""
    return f"step_{step:08d}" + (f".{attempt}" if attempt > 1 else "")


@dataclass(frozen=True)
class Entry:
    """One committed checkpoint as found on disk. fault: why it cannot be loaded; "" for a complete one."""

    path: Path
    step: int
    attempt: int
    record: dict[str, Any]  # what meta.json holds; {} if it cannot be read
    fault: str

    @property
    def sequence(self) -> int:
        return int(self.record.get("sequence", -1))

    @property
    def bytes(self) -> int:
        return sum(self.record.get("files", {}).values())


def inspect(path: Path) -> Entry | None:
    """The checkpoint at `path`, complete or not; None if the name is not a checkpoint's. Reads meta.json and sizes."""
    match = _NAME.fullmatch(path.name)
    if match is None or not path.is_dir():
        return None
    step, attempt = int(match[1]), int(match[2] or 1)
    try:
        record = read_sealed(path / META)
    except FileNotFoundError:
        return Entry(path, step, attempt, {}, f"{META} is missing")
    except (OSError, ValueError) as error:
        return Entry(path, step, attempt, {}, str(error))
    if fault := _shape_of_record(record):
        return Entry(path, step, attempt, {}, f"{META} is damaged: {fault}")
    if record["step"] != step:
        return Entry(path, step, attempt, {}, f"{META} is of another save: of step {record['step']}")
    if fault := _sizes(path, record["files"]):
        return Entry(path, step, attempt, record, fault)
    if seal(path / INDEX) != record["index"]:
        # Which of the two is wrong nobody can tell, so nothing in the record is believed: not even its place in the order.
        return Entry(path, step, attempt, {}, f"{INDEX} is damaged, or of another save than {META}")
    return Entry(path, step, attempt, record, "")


def _shape_of_record(record: Any) -> str:
    if not isinstance(record, dict):
        return "not an object"
    for key, kind in (
        ("format", int),
        ("step", int),
        ("sequence", int),
        ("world", int),
        ("index", str),
        ("files", dict),
        ("meta", dict),
    ):
        if not isinstance(record.get(key), kind):
            return f"no valid {key!r}"
    if record["format"] > FORMAT:
        return f"format {record['format']} is newer than this program's {FORMAT}"
    if not record["files"] or not all(isinstance(size, int) for size in record["files"].values()):
        return "no valid 'files'"
    return ""


def _sizes(path: Path, files: dict[str, int]) -> str:
    for name, size in sorted(files.items()):
        try:
            found = (path / name).stat().st_size
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            return f"{name}{writer(name)} is missing" if missing else f"{name}{writer(name)}: {error.strerror}"
        if found != size:
            return f"{name}{writer(name)} has {found} bytes instead of {size}"
    return ""


def writer(name: str) -> str:
    """Which rank wrote a file, for messages; "" for the files that rank 0 writes for all."""
    match = _OF_RANK.fullmatch(name)
    return f" (written by rank {int(match[1])})" if match else ""


def entries(folder: Path) -> list[Entry]:
    """Every checkpoint in `folder`, newest first. Those whose meta.json is unreadable come first, by step."""
    if not folder.is_dir():
        return []
    found = [entry for path in folder.iterdir() if (entry := inspect(path)) is not None]
    return sorted(found, key=lambda e: (not e.record, e.sequence, e.step, e.attempt), reverse=True)


def leftovers(folder: Path) -> list[Path]:
    """What dead jobs left in `folder`: saves that were not committed, deletions that were not finished."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _LEFTOVER.fullmatch(path.name))


def loadable(folder: Path, report: Callable[[str], None], strict: bool = False) -> list[Entry]:
    """The complete checkpoints in `folder`, newest first; [] if there never was one. Skipped ones get a line each.

    Raises NoLoadableCheckpoint if there are, or were, checkpoints, and none is complete; strict: or if the newest is not.
    """
    found = entries(folder)
    if strict and found and found[0].fault:
        raise refused(found[0].path, found[0].fault)
    for entry in found:
        if entry.fault:
            report(f"skipping checkpoint {entry.path}: {entry.fault}")
    good = [entry for entry in found if not entry.fault]
    if good:
        return good
    if found:
        raise NoLoadableCheckpoint(
            f"none of the {len(found)} checkpoints in {folder} is complete "
            f"(newest: {found[0].path.name}: {found[0].fault}). "
            "Restore one from a copy, or start another run folder."
        )
    if (folder / LATEST).exists():
        # A pointer without anything to point at: the checkpoints were moved away, or are not visible from here.
        raise NoLoadableCheckpoint(
            f"{folder / LATEST} shows that checkpoints were written here, but there is none. "
            "Bring them back, or remove that file to start from the beginning."
        )
    return []


def refused(path: Path, fault: str) -> NoLoadableCheckpoint:
    """What strict says of the newest checkpoint when it is damaged."""
    return NoLoadableCheckpoint(
        f"checkpoint {path} cannot be loaded: {fault}. Because of checkpoint.strict no older one is taken instead: "
        "restore it from a copy, move it away, or set checkpoint.strict=false."
    )


def resolve(path: Path) -> Path:
    """The folder of checkpoints meant by `path`: itself, or its subfolder `checkpoints` if it is a run folder."""
    inner = path / "checkpoints"
    return inner if inner.is_dir() else path
