"""Whether this host is fit for the job, before its first start: `python -m launch.preflight` in a process of its own."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import agent
from launch.journal import Record
from pretrain import exit as codes

SHORTLY = 120.0  # seconds between the beginnings of a job's hosts
SHOWN = 3  # failures in the one line; the file has all of them


def unfit(run: Path, file: Path, requests: agent.Requests) -> str | None:
    """Why this host must not train, in one line; None when nothing failed.

    run: whose disk is looked at. file: gets all results.
    """
    with contextlib.suppress(OSError):
        file.unlink()
    command = [sys.executable, "-m", "launch.preflight", "--run", str(run), "--json", str(file)]
    try:
        code = agent.run(command, requests, lambda: False)
    except OSError as error:
        return f"preflight cannot be started: {error}"
    if code == codes.FINISHED:
        return None
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["results"]
        bad = [f"{row['subject'] or row['check']}: {row['text']}" for row in rows if row["status"] == "fail"]
    except (OSError, ValueError, KeyError, TypeError):
        bad = []
    more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return "; ".join(bad[:SHOWN]) + more if bad else f"preflight ended with {code}"


def unfit_host(records: Sequence[Record], job: str, here: str, began: float) -> Record | None:
    """The note of another host that has found itself unfit for this job shortly before `began`, and not begun anew since.

    It may have been done before this host noted its own beginning. Job names are used again, hence "shortly".
    """
    last = {}
    for record in records:
        if (
            record.get("job") == job
            and record["host"] != here
            and (record["event"] == "preflight" or record.get("unfit"))
        ):
            last[record["host"]] = record
    return next(
        (r for r in last.values() if r.get("unfit") and r.get("scope") == "job" and r["time"] > began - SHORTLY), None
    )
