"""Runs checks side by side, none of which can hold up the others or the program."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from launch.preflight.check import Check, Result, failed, not_checked
from launch.preflight.node import Node


@dataclass
class Report:
    """What has been found so far, in the order of the checks."""

    names: list[str]
    found: dict[str, list[Result]]
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        return all(name in self.found for name in self.names)

    @property
    def results(self) -> list[Result]:
        interrupted = [not_checked("interrupted")]
        return [replace(result, check=name) for name in self.names for result in self.found.get(name, interrupted)]


def run(checks: Sequence[Check], node: Node, waiting: Callable[[list[str]], None], report: Report) -> None:
    """Runs the checks and fills the report. waiting: told, now and then, which have not ended.

    Raises KeyboardInterrupt like anything else; the report then has what came before.
    """
    begun = time.monotonic()
    # Checks wait for processes, each of which has its own limit; this one is for a file of /sys that never answers.
    deadline = begun + 3 * node.limit + 6 * node.tool_limit
    done: queue.Queue[tuple[str, list[Result]]] = queue.Queue()
    for check in checks:
        # A daemon: one that hangs inside the kernel does not keep the program from ending.
        threading.Thread(target=lambda check=check: done.put((check.name, guarded(check, node))), daemon=True).start()
    left = [check.name for check in checks]
    while left:
        waiting(left)
        try:
            name, results = done.get(timeout=0.2)
        except queue.Empty:
            report.seconds = time.monotonic() - begun
            if time.monotonic() < deadline:
                continue
            for name in left:
                report.found[name] = [
                    failed(f"has not ended after {time.monotonic() - begun:.0f} s: it hangs in the kernel")
                ]
            return
        left.remove(name)
        report.found[name] = results
        report.seconds = time.monotonic() - begun


def guarded(check: Check, node: Node) -> list[Result]:
    """What the check says. A fault in the check itself says nothing about the node: that is no pass, and no failure."""
    try:
        return list(check.run(node))
    except Exception as error:
        return [not_checked(f"the check itself failed: {type(error).__name__}: {error}"[:300])]


def strict(results: Sequence[Result]) -> list[Result]:
    """Warnings as failures."""
    return [replace(result, status="fail") if result.status == "warn" else result for result in results]
