"""The results as a table for people, and as JSON for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.preflight.check import STATUSES, Result

STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "not checked": "dim"}


def console(stderr: bool = False) -> Console:
    """Wide in a pipe, where rich would assume 80 columns, unless COLUMNS says otherwise."""
    tty = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if tty or os.environ.get("COLUMNS", "").isdigit() else 200
    return Console(highlight=False, stderr=stderr, width=width)


NARROW = 72  # columns; below that a table has no room for its texts


def show(
    title: str, results: Sequence[Result], seconds: float | None = None, all: Sequence[Result] | None = None
) -> None:
    """all: what the last line counts, where `results` are some of them."""
    out = console()
    last = summary(results if all is None else all) + ("" if seconds is None else f" in {seconds:.1f} s")
    results = once_each(results)
    if out.width < NARROW:
        out.print(escape(title))
        for result in results:
            what = escape(f"{result.check} {result.subject}".strip())
            out.print(f"[{STYLES[result.status]}]{result.status}[/] {what}: {escape(result.text)}")
    else:
        out.print(_table(title, results, out.width))
    out.print(escape(last), soft_wrap=True)


def _table(title: str, results: Sequence[Result], width: int) -> Table:
    table = Table(title=escape(title), title_justify="left", header_style="bold", box=None, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("subject", overflow="fold", max_width=max(16, width // 4))
    table.add_column("found", overflow="fold")
    last = None
    for result in results:
        status = f"[{STYLES[result.status]}]{result.status}[/]"
        table.add_row(result.check if result.check != last else "", status, escape(result.subject), escape(result.text))
        last = result.check
    return table


def once_each(results: Sequence[Result]) -> list[Result]:
    """The same reason for not checking is written out once: without GPUs, ten checks would give it."""
    first: dict[str, str] = {}
    told = []
    for result in results:
        said = first.setdefault(result.text, result.check)
        again = result.status == "not checked" and said != result.check
        told.append(replace(result, text=f"as {said}") if again else result)
    return told


def summary(results: Sequence[Result]) -> str:
    """ "12 passed, 1 warning, 0 failed, 3 not checked"."""
    counts = count(results)
    warnings = f"{counts['warn']} warning" + ("" if counts["warn"] == 1 else "s")
    return f"{counts['pass']} passed, {warnings}, {counts['fail']} failed, {counts['not checked']} not checked"


def count(results: Sequence[Result]) -> dict[str, int]:
    return {status: sum(result.status == status for result in results) for status in STATUSES}


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [
        {"check": r.check, "subject": r.subject, "status": r.status, "text": r.text, "values": r.values} for r in results
    ]  # fmt: skip


def write(path: Path, content: dict[str, Any]) -> None:
    """A file appears whole or not at all. Raises OSError."""
    text = json.dumps(content, indent=1, default=str, allow_nan=False) + "\n"
    if path.exists() and not path.is_file():  # /dev/stdout and the like, which a rename would replace
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
