"""The table of failures: what may happen to a job, and the tests that make it happen. Numbers are those of the README."""

from __future__ import annotations

from typing import NamedTuple

CHECKPOINT = "tests/pretrain/checkpoint"
TRAIN = "tests/pretrain/train"


class Row(NamedTuple):
    """tests: pytest nodes, files or single tests."""

    what: str
    tests: tuple[str, ...]


ROWS: dict[int, Row] = {
    1: Row(
        "kill -9 of one rank",
        (f"{CHECKPOINT}/test_lifecycle.py::test_kill_9_before_the_commit_leaves_the_previous_one",),
    ),
}
