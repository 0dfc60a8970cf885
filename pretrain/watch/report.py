"""How the watchers of all ranks, on all hosts, meet over a hang: in a folder `hangs/ATTEMPT` of the run.

Whoever sees a limit passed makes the folder; the others look for it once a second while their own rank makes no progress. Each
writes what it sees of its rank, one sums up. Nothing but the folder is shared: the training processes, and the network between
them, are what may be at fault.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from pretrain.watch.blame import Report, summary

FOLDER = "hangs"
KEEP = 5  # newest
SUMMARY = "summary.txt"
CAUSE = "cause.txt"

T = TypeVar("T")


def within(seconds: float, function: Callable[[], T]) -> T | None:
    """What `function` returns; None if it is not done by then, or failed. A file system that hangs does not take us along."""
    results: list[T] = []

    def call() -> None:
        try:
            results.append(function())
        except OSError as error:
            print(f"hang report: {error}", flush=True)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def share(run: Path, attempt: str, mine: Report, stacks: str, world: int, cause: str, gather: float) -> str:
    """Writes down `mine` and waits for the other ranks, at most `gather` seconds. Returns what to print: "" on all but one."""
    folder = run / FOLDER / attempt
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError), (folder / CAUSE).open("x") as file:
        file.write(cause)  # the first one's; the others have only been called
    head = "".join(f"{key}: {value}\n" for key, value in asdict(mine).items())
    _write(folder / f"rank_{mine.rank:05d}.txt", f"{head}\n{stacks}")
    deadline = time.monotonic() + gather
    while len(found := sorted(folder.glob("rank_*.txt"))) < world and time.monotonic() < deadline:
        time.sleep(0.2)
    if found[0].name != f"rank_{mine.rank:05d}.txt":
        return ""
    cause = (folder / CAUSE).read_text() or cause
    text = summary([read(path) for path in found], world, cause, str(folder))
    _write(folder / SUMMARY, text + "\n")
    _prune(folder.parent)
    return text


def _write(path: Path, text: str) -> None:
    """Whole or not at all: other ranks and a supervisor wait for it."""
    temporary = path.with_name(f".{path.stem}.partial")
    temporary.write_text(text)
    temporary.rename(path)


def read(path: Path) -> Report:
    """The head of a rank's file."""
    values: dict[str, Any] = {}
    kinds = {field.name: str(field.type) for field in fields(Report)}
    readers: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "bool": lambda word: word == "True"}
    for line in path.read_text().partition("\n\n")[0].splitlines():
        key, _, text = line.partition(": ")
        values[key] = readers.get(kinds[key], str)(text)
    return Report(**values)


def _prune(folder: Path) -> None:
    newest = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest[KEEP:]:
        shutil.rmtree(path, ignore_errors=True)
