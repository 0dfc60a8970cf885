"""The supervisors' journal, `<run>/supervise.jsonl`: one JSON object a line, appended by the supervisor of every host.

Events: preflight (this host begins to check itself), start (torchrun begins), end (how it ended, rank by rank, and what was
decided), after (a decision of another kind: after a look at the other hosts, or before any start), readmit (a person lets a host
in again). Their order in the file is the order in which they happened, whatever the hosts' clocks say.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from launch.outcome import words_for

Record = dict[str, Any]


class Journal:
    def __init__(self, run: Path):
        self.path = run / "supervise.jsonl"

    def append(self, record: Record) -> int | None:
        """Adds a line that is on disk on return; the place after it, for `records`.

        A journal that cannot be written never ends the job: it says so, returns None, and the job goes on.
        """
        line = json.dumps({"time": round(time.time(), 3), **record})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                # On NFS two clients that append at once would overwrite each other; the lock also refreshes the file's length.
                _lock(descriptor)
                size = os.fstat(descriptor).st_size
                torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # whoever wrote last was killed half-way
                os.write(descriptor, (("\n" if torn else "") + line + "\n").encode())
                place = os.lseek(descriptor, 0, os.SEEK_CUR)  # not the length: another host may have gone on by now
                os.fsync(descriptor)
                return place
            finally:
                os.close(descriptor)
        except OSError as error:
            print(f"supervise: {self.path}: {error.strerror}; not noted: {line}", file=sys.stderr, flush=True)
            return None

    def records(self, since: int = 0) -> list[Record]:
        """Every whole line from the place `since` on; a torn one is passed over."""
        return self.read(since)[0]

    def read(self, since: int = 0) -> tuple[list[Record], int]:
        """The same, and the place after them."""
        try:
            with self.path.open("rb") as file:
                file.seek(since)
                text = file.read()
        except OSError:
            return [], since
        found: list[Record] = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and "event" in record and "host" in record:
                    found.append(record)
        return found, since + text.rfind(b"\n") + 1


def _lock(descriptor: int) -> None:
    """Waits for the file's lock, but not long: a line beside another's beats a supervisor that waits forever."""
    for _ in range(20):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:  # a filesystem without locks
            return


def show(run: Path) -> int:
    """Prints the journal of a run as a table; the exit code."""
    records = Journal(run).records()
    if not records:
        print(f"error: {Journal(run).path} has no entries; is {run} the folder of a supervised run?", file=sys.stderr)
        return 2
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(Journal(run).path), title_justify="left")
    for name in ("time", "host", "event", "step", "checkpoint", "ranks", "decision"):
        table.add_column(name, overflow="fold")
    for record in records:
        table.add_row(
            datetime.fromtimestamp(record["time"]).strftime("%m-%d %H:%M:%S"),
            str(record.get("host", "")),
            str(record.get("event", "")),
            "" if record.get("step") is None else str(record["step"]),
            str(record.get("newest") or ""),
            "\n".join(words_for(end) for end in record.get("ranks", ())),
            _decision(record),
        )
    console = Console()
    console.print(table) if console.is_terminal else Console(width=200).print(table)
    return 0


def _decision(record: Record) -> str:
    if record.get("event") == "start":
        return f"torchrun with {record.get('nodes')} node(s) x {record.get('processes')} rank(s)"
    text = f"{record.get('decision', '')}: {record.get('why', '')}".strip(": ")
    if record.get("decision") in ("stop", "leave"):
        text += f" (exit code {record.get('code')})"
    if record.get("wait"):
        text += f" (waits {record['wait']:.1f} s)"
    return text
