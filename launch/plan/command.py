"""What the command does, once its arguments are read."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from launch.plan import numbers, plot, show
from launch.plan.failures import LLAMA_NODE_MTBF, Failures, failures
from launch.plan.forecast import Forecast, Planner
from launch.plan.legal import Legality
from launch.plan.reasons import duration
from launch.plan.room import remedies
from launch.plan.search import QUICK_PP, RECOMPUTE, Progress, Search
from launch.plan.sizing import advice
from launch.plan.source import Question, ask, with_
from launch.plan.step_time import update_bytes
from launch.plan.sweep import COUNTS, curves, no_layout
from pretrain.config import ConfigError
from pretrain.exit import ERROR, FINISHED

if TYPE_CHECKING:
    from rich.console import Console

STAGING_GBS = (
    10.0  # GB/s from a device to its host's memory while all GPUs of a node copy: what a background save stops for
)
WIDTH = 160  # of tables, where the output is no terminal


def run(arguments: argparse.Namespace) -> int:
    """The exit code. Raises ConfigError or Exit for what the user can mend."""
    if arguments.plot is not None:
        plot.check(arguments.plot)
        if not arguments.search and arguments.sweep is None:
            raise ConfigError("--plot draws a --sweep gpus or a --search; add one of them")
    if arguments.search and arguments.sweep is not None:
        raise ConfigError("--search and --sweep gpus are two questions; a sweep searches at each number of GPUs anyway")
    question = ask(
        arguments.config,
        arguments.hardware,
        arguments.gpus,
        arguments.overrides,
        tokens=arguments.tokens,
        overlap=arguments.overlap,
        headroom=arguments.headroom,
        efficiency=arguments.efficiency,
        remember=not arguments.no_cache,
    )
    task = _Task(arguments, question, _console(arguments))
    if arguments.sweep is not None:
        code = task.sweep()
    elif arguments.search:
        code = task.search()
    else:
        code = task.predict()
    if question.book is not None:
        question.book.close()
    if arguments.json is not None:
        text = json.dumps(_finite(task.record), indent=1, allow_nan=False) + "\n"
        if str(arguments.json) == "-":
            sys.stdout.write(text)
        else:
            arguments.json.write_text(text)
            task.say(f"wrote {arguments.json}")
    return code


class _Task:
    def __init__(self, arguments: argparse.Namespace, question: Question, console: Console | None):
        self.arguments, self.question, self.console = arguments, question, console
        self.planner, self.legality = Planner(question), Legality(question.model.model)
        self.record: dict[str, Any] = {"question": numbers.question(question)}
        self.say(show.heading(question))

    def say(self, *lines: Any) -> None:
        if self.console is not None:
            for line in lines:
                self.console.print(line, soft_wrap=isinstance(line, str) and not self.console.is_terminal)

    def predict(self) -> int:
        return self.describe(self.configured())

    def configured(self) -> Forecast:
        """Of the configuration's own layout. Raises ConfigError where the run would refuse it."""
        question = self.question
        try:
            grid = question.config.mesh.grid(question.gpus)
        except ValueError as error:
            raise ConfigError(f"--gpus {question.gpus}: {error}") from None
        reason = self.legality.refusal(question.config, grid)
        if reason is not None:
            raise ConfigError(f"--gpus {question.gpus}: {reason}")
        return self.planner.forecast(question.config, grid)

    def describe(self, forecast: Forecast) -> int:
        """Everything about one layout."""
        choices = self.choices(forecast)
        self.say("", show.model(self.question, forecast), show.memory(choices, forecast.config.train.recompute))
        found = [] if forecast.fits else remedies(self.planner, self.legality, forecast)
        if not forecast.fits:
            self.say(*show.shortage(forecast, found), "")
        table = show.messages(forecast)
        if table is not None:
            self.say(table)
        lost = self.failures(forecast)
        rules = advice(self.planner, self.legality, forecast)
        self.say(
            show.step(forecast), *show.speed(forecast), "", *show.reliability(lost, forecast), "", show.sizing(rules)
        )
        self.assumptions(forecast)
        impossible = show.impossible(forecast)
        if impossible is not None:
            print(f"error: {impossible}", file=sys.stderr)
        self.record |= {
            "forecast": numbers.forecast(forecast),
            "recompute": numbers.memory(choices),
            "failures": numbers.failures(lost),
            "sizing": numbers.advice(rules),
            "would_fit": numbers.remedies(found),
        }
        return FINISHED if forecast.fits and impossible is None else ERROR

    def choices(self, forecast: Forecast) -> dict[str, Forecast]:
        """The same with every choice of activation checkpointing."""
        config = forecast.config
        each = {mode: with_(config, train={"recompute": mode}) for mode in RECOMPUTE}
        return {
            mode: forecast if mode == config.train.recompute else self.planner.forecast(one, forecast.grid)
            for mode, one in each.items()
        }

    def failures(self, forecast: Forecast) -> Failures:
        arguments, question = self.arguments, self.question
        state = question.model.state_bytes
        held = state / question.model.parameters * max(stage.parameters for stage in forecast.costs.stages)
        writing = state / (1e9 * arguments.storage_gbs)
        staging = held / (1e9 * STAGING_GBS)
        background = forecast.config.checkpoint.background
        save = (
            arguments.save_seconds if arguments.save_seconds is not None else staging + (0.0 if background else writing)
        )
        return failures(
            -(-forecast.grid.world // question.node),
            arguments.node_mtbf or LLAMA_NODE_MTBF,
            max(save, 1e-3),
            writing if background else 0.0,
            arguments.restart_seconds,
            forecast.time.seconds,
            forecast.config.checkpoint.every,
        )

    def search(self) -> int:
        with _progress("layouts") as progress:
            search = Search(self.planner, self.legality, self.fixed(), progress)
            start = time.perf_counter()
            found = search.run(self.question.config, self.question.gpus)
            spent = time.perf_counter() - start
        self.record["search"] = numbers.search(found, self.question.config)
        self.say(
            f"{found.tried} configurations on {found.grids} legal grids in {duration(spent)}"
            + ("; interrupted, so there may be better ones" if found.interrupted else ""),
            "",
        )
        if found.ranked:
            self.say(show.candidates(found, self.arguments.top), show.to_use(found.ranked[0], self.question.config), "")
        refused = show.refused(found)
        if refused is not None:
            self.say(refused)
        if not found.ranked:
            self.say(no_layout(found))
            if found.closest is not None:
                more = remedies(self.planner, self.legality, found.closest)
                self.say(*show.shortage(found.closest, more))
            return ERROR
        if self.arguments.plot is not None:
            plot.draw_search(found, self.arguments.plot, show.heading(self.question))
            self.say(f"wrote {self.arguments.plot}")
        self.say("The first, in full:")
        return self.describe(found.ranked[0])

    def sweep(self) -> int:
        counts = self.arguments.sweep or COUNTS
        fixed = self.fixed() - {"mesh.dp"}
        with _progress("numbers of GPUs") as progress:
            search = Search(self.planner, self.legality, fixed)
            found = curves(
                search, self.question.config, self.question.gpus, counts, self.arguments.keep_layout, progress
            )
        self.record["sweep"] = numbers.curves(found)
        config = self.question.config
        share = max(1, round(config.train.batch / self.question.gpus))
        which = f"the best layout for each number of GPUs (pp above {QUICK_PP} only where nothing else runs)"
        self.say(
            f"strong: {config.train.batch} sequences of {config.data.sequence_length} a step; weak: {share} for each GPU; "
            + ("the configuration's layout" if self.arguments.keep_layout else which),
            "",
            show.scaling(found),
        )
        if found.interrupted:
            self.say("interrupted: these are the points so far")
        points = [*found.strong, *found.weak]
        best = next((point.forecast for point in points if point.forecast is not None), None)
        if self.arguments.plot is not None and points:
            plot.draw_curves(found, self.arguments.plot, show.heading(self.question))
            self.say(f"wrote {self.arguments.plot}")
        if best is not None:
            self.assumptions(best)
        return FINISHED if best is not None else ERROR

    def fixed(self) -> frozenset[str]:
        """Keys that the user gave: a search keeps them."""
        return frozenset(override.partition("=")[0] for override in self.arguments.overrides)

    def assumptions(self, forecast: Forecast) -> None:
        question = self.question
        lines = [*question.notes, *forecast.chip.notes]
        if not self.arguments.verbose:
            assumed = [line for line in lines if "assumed" in line]
            if assumed:
                self.say("", *(f"note: {line}" for line in assumed), "--verbose prints every assumption.")
            self.record["assumptions"] = lines
            return
        lines += rules(self.arguments, question)
        self.record["assumptions"] = lines
        self.say("", "assumptions:", *(f"  - {line}" for line in lines))


def rules(arguments: argparse.Namespace, question: Question) -> list[str]:
    """The time model in words."""
    mtbf = arguments.node_mtbf or LLAMA_NODE_MTBF
    source = "" if arguments.node_mtbf else " (419 failures in 54 days on 2048 nodes: Llama 3, arXiv 2407.21783)"
    return [
        "a matrix product's backward pass is two products of the same work; each product takes at least as long as its "
        "matrices take through memory",
        "element-wise work moves each byte that the forward pass keeps five times: written, read, read in the backward pass, "
        "its gradient written and read; under autocast each weight is cast, and its gradient added, once a micro-batch",
        f"the optimizer reads and writes {update_bytes(question.config):.0f} bytes a parameter, clipping 8 more",
        "recomputed activations take their FLOPs again, at the rate of the first time, and their bytes twice",
        "messages take alpha + bytes x factor / busbw by the fabric section, all ranks at once and none beside another",
        f"messages that can overlap do so with {question.overlap:.0%} of the computation of the micro-batches they belong to, "
        "at no cost to it; of gradients that are summed once a step, with the last backward pass only; the longest call stays "
        "exposed. Messages of tensor, context and expert parallelism that the next product waits for are never hidden",
        "a pipeline's slowest rank sets the pace; it idles in proportion bubble / (1 - bubble) of the other ranks' work",
        "experts get equally many tokens; no straggler, no data loading, no kernel launch is counted",
        f"memory: {question.headroom:.0%} of {question.hardware.memory_gib:g} GiB stays free for the allocator, NCCL or RCCL",
        f"a node fails every {duration(mtbf)}{source}; a restart takes {duration(arguments.restart_seconds)}",
        f"a save copies the fp32 state to the host at {STAGING_GBS:g} GB/s a GPU while training waits, and goes to storage at "
        f"{arguments.storage_gbs:g} GB/s in all"
        if arguments.save_seconds is None
        else f"a save stops training for {duration(arguments.save_seconds)}",
    ]


def _console(arguments: argparse.Namespace) -> Console | None:
    """None where the numbers go to the standard output."""
    if str(arguments.json) == "-":
        return None
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(highlight=False, markup=False, emoji=False, width=WIDTH)


@contextmanager
def _progress(what: str) -> Iterator[Progress]:
    """A bar on the error output, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn(what), MofNCompleteColumn(), BarColumn(bar_width=24), console=Console(stderr=True), transient=True
    )
    with bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _finite(value: Any) -> Any:
    """JSON has no infinities."""
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
