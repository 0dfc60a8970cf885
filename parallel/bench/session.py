"""A run from start to end: join, measure in turn, leave; and how it ends when it is stopped or a rank is lost."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from parallel.bench import machine, setting
from parallel.bench.device import Launch
from parallel.bench.groups import Team, choose, read_mesh, teams
from parallel.bench.interrupt import Interrupted, Stop
from parallel.bench.operations import chosen
from parallel.bench.options import INTEGERS
from parallel.bench.overlap import Product, beside
from parallel.bench.report import Report
from parallel.bench.sweep import Bench, Task
from parallel.bench.timing import Control
from parallel.processes import join, leave


def run(options: argparse.Namespace) -> int:
    """Joins the job, measures, and leaves. The exit code."""
    try:
        operations = chosen(options.ops or ["all_reduce"])
        backend = setting.backend(options)
        config = read_mesh(options.config, options.mesh) if options.config or options.mesh else None
        fabric = setting.fabric(options.hardware) if options.hardware else None
    except ValueError as error:
        return _usage(str(error))
    launch = Launch(options.stream or "current", options.cuda_graph, options.high_priority)
    launch.prepare_environment()
    processes = join("cpu" if backend == "gloo" else "cuda", options.timeout, group_for_one=True)
    with Stop() as stop:
        control = Control(processes, stop)
        try:
            node = setting.node_size(options, control)
            shapes = choose(options.groups, processes.world, node, config.grid(processes.world) if config else None)
            tasks, notes = setting.tasks(options, backend, shapes, operations)
            problem = processes.broadcast(setting.unwritable(options) if processes.first else None)
            if problem:
                raise ValueError(problem)
            ceilings = {shape.name: setting.ceilings(fabric, shape, operations, node) for shape in shapes}
        except ValueError as error:
            leave()
            return _usage(str(error))
        except Interrupted as told:
            leave()
            return 128 + told.number
        ours = teams(shapes, processes.rank, processes.world, options.one_group, processes.timeout)
        bench = Bench(control, setting.plan(options), launch, backend, setting.ranks_here(), options.check, notes)
        where = machine.describe(processes, backend, node)
        report = Report(options, processes, stop, where, shapes, ceilings)
        return _measure(bench, report, {team.shape.name: team for team in ours}, tasks, options)


def _measure(
    bench: Bench,
    report: Report,
    ours: dict[str, Team],
    tasks: Sequence[tuple[str, dict[str, Any]]],
    options: argparse.Namespace,
) -> int:
    code = 0
    try:
        for name, what in tasks:
            task = Task(team=ours[name], **what)
            report.begin(task)
            if options.overlap is None:
                for row in bench.rows(task):
                    report.row(row)
            else:
                side = options.overlap or (4096 if bench.device.type == "cuda" else 512)
                product = Product(side, "fp32" if task.dtype in INTEGERS else task.dtype, bench.device)
                for row, record in beside(bench, task, product):
                    report.beside(row, record)
            report.end()
    except Interrupted as told:
        code = 128 + told.number
        report.stopped = str(told)
    except RuntimeError as error:  # torch's: a rank is gone, no memory, an op that the backend does not have
        report.finish(bench, complete=False)
        reason = str(error).strip().splitlines()[0].partition(" This is typically")[0]
        doing = f"{task.operation.name} over {task.team.shape.name}"
        print(f"rank {report.processes.rank} cannot go on with {doing}: {reason}", file=sys.stderr, flush=True)
        return 1  # without leave(): the others may wait in a collective that we never come back to
    report.finish(bench, complete=code == 0)
    # A launcher that sees one rank leave with an error ends the others: not before rank 0 has written its files.
    report.processes.barrier()
    leave()
    return code or (1 if bench.faults else 0)


def _usage(message: str) -> int:
    if int(os.environ.get("RANK", 0)) == 0:  # once, not once a rank
        print(f"error: {message}\nsee python -m parallel.bench --help", file=sys.stderr, flush=True)
    return 2
