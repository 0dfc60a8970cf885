"""One run of the checks on one node: from the choice of names to the exit code."""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from launch.preflight import report
from launch.preflight.catalogue import CHECKS
from launch.preflight.check import Result
from launch.preflight.execute import Report, run, strict
from launch.preflight.node import Node, now
from pretrain.exit import ERROR, FINISHED


def alone(options: argparse.Namespace, node: Node) -> int:
    found, interrupted = examine(options, node)
    host = socket.gethostname()
    report.show(f"preflight of {host}", found.results, found.seconds)
    content = record(host, found.results, found.seconds, found.complete)
    return close(options, content, found.results, interrupted)


def examine(options: argparse.Namespace, node: Node) -> tuple[Report, bool]:
    """(Report of this node's own checks, whether it was interrupted). Says on a terminal what it waits for."""
    chosen = [check for check in CHECKS if check.name in options.names]
    found = Report([check.name for check in chosen], {})
    interrupted = False
    with telling() as waiting:
        try:
            run(chosen, node, waiting, found)
        except KeyboardInterrupt:
            interrupted = True
    if options.strict:
        found.found = {name: strict(results) for name, results in found.found.items()}
    return found, interrupted


def record(host: str, results: Sequence[Result], seconds: float, complete: bool) -> dict[str, Any]:
    return {
        "host": host, "time": now(), "seconds": round(seconds, 3), "complete": complete,
        "failed": any(result.status == "fail" for result in results),
        "counts": report.count(results), "results": report.rows(results),
    }  # fmt: skip


def close(options: argparse.Namespace, content: dict[str, Any], results: Sequence[Result], interrupted: bool) -> int:
    """Writes the file that was asked for; the exit code."""
    if options.json:
        try:
            report.write(options.json, content)
        except OSError as error:
            print(f"error: {options.json}: {error.strerror}", file=sys.stderr)
            return ERROR
    if interrupted:
        print("interrupted", file=sys.stderr)
        return 130
    return ERROR if any(result.status == "fail" for result in results) else FINISHED


@contextlib.contextmanager
def telling() -> Iterator[Callable[[list[str]], None]]:
    """A line at the bottom of a terminal that says what is waited for; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda names: None
        return
    with report.console(stderr=True).status("checking") as status:
        yield lambda names: status.update(f"waiting for {', '.join(names[:6])}" + (" ..." if len(names) > 6 else ""))
