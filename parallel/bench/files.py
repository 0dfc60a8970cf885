"""What a run leaves behind: JSON and CSV, replaced in one go, so that a file is never half written."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from parallel.bench.rows import Row

CONVENTION = "nccl-tests"


def replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def writable(path: Path) -> str | None:
    """Why a file of this name could not be written, or None: to be known before the measurement, not after it."""
    try:
        if path.is_dir():
            return f"{path} is a folder; name a file in it"
        trial = path.with_name(f".{path.name}.{os.getpid()}")
        trial.touch()
        trial.unlink()
    except OSError as error:
        return f"{path} cannot be written: {error.strerror or error}"
    return None


def to_json(
    machine: dict[str, Any],
    groups: Sequence[dict[str, Any]],
    rows: Sequence[Row],
    overlaps: Sequence[dict[str, Any]],
    fits: Sequence[dict[str, Any]],
    advice: dict[str, Any] | None,
    complete: bool,
) -> str:
    """One object, a row a line. `complete` is false for a run that was stopped."""
    head = {"convention": CONVENTION, "complete": complete, "machine": machine}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for key, values in (
        ("groups", groups),
        ("rows", [row.as_json() for row in rows]),
        ("overlap", overlaps),
        ("fits", fits),
    ):
        inner = ",\n  ".join(json.dumps(value) for value in values)
        lines.append(f' "{key}": [\n  {inner}\n ]' if inner else f' "{key}": []')
    lines.append(f' "advice": {json.dumps(advice)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def to_csv(rows: Sequence[Row]) -> str:
    """A line of names, then one a row; empty where there is no value."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.as_json() for row in rows)
    return text.getvalue()
