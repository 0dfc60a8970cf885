"""Everything that may happen to a job, made to happen: `python -m tests.faults.campaign`.

Four parts: runs that are killed at random and must end like untouched ones (kills.py), runs that change their layout at
every start (reshapes.py), random bit flips in a checkpoint, each of which must be refused, and the table of failures
(rows.py), each row shown by its tests. Every trial follows from the seed.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.faults.kills import LAYOUTS, Outcome, Trials, draw
from tests.faults.reshapes import Reshapes
from tests.faults.rows import ROWS
from tests.pretrain.checkpoint.test_blocks import flips
from tests.pretrain.corpus import prepare

EXAMPLES = """examples:
  python -m tests.faults.campaign --trials 200 --reshapes 30 --flips 1000 --seed 0        the whole campaign
  python -m tests.faults.campaign --trials 20 --reshapes 0 --flips 0 --no-rows --layouts "ZeRO-2"
  python -m tests.faults.campaign --trials 0 --reshapes 0 --flips 0 --rows 9 10         two rows of the table

Exit codes: 0 everything passed, 1 something did not, 2 bad usage."""


def counted(count: int, what: str, console: Console) -> Iterator[int]:
    """0 to count - 1, with a bar in a terminal and now and then a line in a log."""
    if console.is_terminal:
        with Progress(console=console, transient=True) as progress:
            yield from progress.track(range(count), description=what)
        return
    for number in range(count):
        yield number
        if (number + 1) % 20 == 0:
            console.print(f"{what}: {number + 1} of {count}", highlight=False)


def kills(trials: Trials, count: int, seed: int, layouts: list[str] | None, console: Console) -> list[Outcome]:
    """Runs `count` trials; failures are printed as they come, with what repeats them."""
    generator = random.Random(seed)
    outcomes = []
    for number in counted(count, "kill trials", console):
        kill = draw(generator, layouts)
        outcome = trials.trial(kill)
        outcomes.append(outcome)
        for fault in outcome.faults:
            console.print(f"[red]trial {number} of seed {seed}[/]: {kill}: {fault}", highlight=False)
    return outcomes


def reshapes(trials: Reshapes, count: int, seed: int, console: Console) -> bool:
    """Runs `count` of them; failures are printed. Returns whether there was none."""
    generator = random.Random(seed)
    passed = 0
    for _ in counted(count, "changes of layout", console):
        what, faults = trials.trial(generator)
        passed += not faults
        for fault in faults:
            console.print(f"[red]{what}[/]: {fault}", highlight=False)
    console.print(f"{count} runs that changed ranks, axes and engine twice: {passed} trained like one rank")
    return passed == count


def kill_table(outcomes: list[Outcome]) -> Table:
    table = Table(title="kill -9, then the same command: must end like an untouched run")
    for column in ("layout", "trials", "died", "passed", "steps lost, mean", "most", "detection p50 (s)", "p95"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.kill.layout].append(outcome)
    for name, group in [*groups.items(), ("all", outcomes)]:
        died = [outcome for outcome in group if outcome.happened]
        seen = sorted(outcome.detection for outcome in died if outcome.detection is not None)
        table.add_row(
            name,
            str(len(group)),
            str(len(died)),
            str(sum(not outcome.faults for outcome in group)),
            f"{statistics.mean(outcome.steps_lost for outcome in died):.2f}" if died else "-",
            str(max(outcome.steps_lost for outcome in died)) if died else "-",
            f"{statistics.median(seen):.2f}" if seen else "-",
            f"{seen[int(0.95 * (len(seen) - 1))]:.2f}" if seen else "-",
        )
    return table


class Tally:
    """A pytest plugin: how each test ended."""

    def __init__(self) -> None:
        self.ended: dict[str, str] = {}
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self.ended[report.nodeid] = report.outcome


def rows(numbers: list[int], campaign: bool) -> tuple[Table, bool]:
    """Runs the tests of the table's rows; (their table, whether all passed)."""
    wanted = {number: row for number, row in ROWS.items() if number in numbers}
    nodes = list(dict.fromkeys(node for row in wanted.values() for node in row.tests))
    tally = Tally()
    options = ["-q", "--no-header", "-p", "no:cacheprovider", *(["--campaign"] if campaign else [])]
    code = pytest.main([*options, *nodes], plugins=[tally])
    table = Table(title="the table of failures")
    for column in ("row", "what happens", "tests", "passed", "seconds"):
        table.add_column(column, justify="right" if column not in ("what happens",) else "left")
    good = code == 0
    for number, row in wanted.items():
        ended = {test: how for test, how in tally.ended.items() if test.startswith(tuple(row.tests))}
        passed = sum(how == "passed" for how in ended.values())
        skipped = sum(how == "skipped" for how in ended.values())
        seconds = sum(tally.seconds[test] for test in ended)
        good &= bool(passed) and passed + skipped == len(ended)
        table.add_row(str(number), row.what, str(len(ended)), str(passed), f"{seconds:.0f}")
    return table, good


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.campaign", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--trials", type=int, default=20, help="runs to kill (default 20)")
    parser.add_argument("--reshapes", type=int, default=4, help="runs that change their layout twice (default 4)")
    parser.add_argument("--flips", type=int, default=200, help="bits to flip in a checkpoint (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="only these layouts of the killed runs")
    parser.add_argument("--rows", nargs="+", type=int, choices=ROWS, help="only these rows of the table")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="work here, and keep the runs of trials that failed"
    )
    parser.add_argument("--no-rows", action="store_true", help="leave the table out")
    parser.add_argument("--campaign", action="store_true", help="with the long tests of the rows")
    arguments = parser.parse_args(argv)
    console = Console()
    start = time.monotonic()
    good = True
    corpus = None
    with contextlib.ExitStack() as closing:
        folder = arguments.keep or closing.enter_context(tempfile.TemporaryDirectory(prefix="braid-campaign-"))
        if arguments.trials:
            corpus = prepare(Path(folder) / "corpus")
            outcomes = kills(Trials(Path(folder), corpus), arguments.trials, arguments.seed, arguments.layouts, console)
            console.print(kill_table(outcomes))
            good &= not any(outcome.faults for outcome in outcomes)
        if arguments.reshapes:
            corpus = corpus or prepare(Path(folder) / "corpus")
            good &= reshapes(Reshapes(Path(folder), corpus), arguments.reshapes, arguments.seed, console)
        if arguments.flips:
            refused = flips(arguments.flips, arguments.seed, Path(folder) / "flips")
            console.print(f"{arguments.flips} random bit flips in a checkpoint's files: {refused} refused")
            good &= refused == arguments.flips
    if not arguments.no_rows:
        table, passed = rows(arguments.rows or list(ROWS), arguments.campaign)
        console.print(table)
        good &= passed
    minutes = (time.monotonic() - start) / 60
    console.print(f"seed {arguments.seed}, {minutes:.1f} minutes: {'all passed' if good else 'NOT ALL PASSED'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
