"""`torchrun --nproc-per-node N -m pretrain.optim.probe --config X [key=value ...]`: does the optimizer do what its name says?

Steps of the run's own model, on its own layout, are taken with the optimizer that the configuration names. Of each, whole weights
and gradients are put together, and every parameter's update is compared by name with what the same optimizer computes on one
rank and with the formulas in fp64, which are written a second time for this. A Muon that is in truth AdamW or SGD, orthogonalises
shards instead of matrices, or forgets a part of its momentum trains with a loss that looks normal; it does not pass this.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from typing import TYPE_CHECKING

from parallel.ending import end
from pretrain.exit import ERROR, FINISHED, USAGE

if TYPE_CHECKING:
    from parallel.mesh import Mesh
    from pretrain.config import RunConfig
    from pretrain.optim.probe.judge import Line
    from pretrain.optim.probe.run import Batches

EXAMPLES = """examples:
  python -m pretrain.optim.probe --config configs/runs/quickstart.yaml --random optimizer.kind=muon model.width=64
  torchrun --nproc-per-node 4 -m pretrain.optim.probe --config X.yaml --layout tp=2 optimizer.kind=muon optimizer.lr=0.1
  torchrun --nproc-per-node 2 -m pretrain.optim.probe --config X.yaml --layout pp=2 optimizer.kind=lamb

The first rank holds the whole model several times, in fp64: make a large one smaller with key=value. The learning rate is the
peak's. With optimizer.precision=bf16 (Muon's default), small singular values are lost in rounding and not judged; fp32 is exact.
Updates below the rounding of the weights show nothing: give a large optimizer.lr, such as 0.1.
Exit codes: 0 every update is the named optimizer's, 1 one is not, 2 bad usage or configuration, 77 missing data."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.optim.probe",
        description="Compare every parameter's update with what the named optimizer computes on one rank.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a run file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="any field by its dotted name: optimizer.kind=muon"
    )
    parser.add_argument("--layout", metavar="LAYOUT", help="the mesh in short: pp=2, or tp=2,cp=2; else as configured")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="steps to take (default 2: momentum counts)")
    parser.add_argument("--random", action="store_true", help="random tokens, in place of the run's data")
    parser.add_argument(
        "--all", action="store_true", help="print every parameter, not one of each kind and what is wrong"
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: give a number of at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    from parallel import processes
    from parallel.mesh import Mesh
    from pretrain.config import ConfigError, load
    from pretrain.data.errors import DataError
    from pretrain.optim.probe.run import probe
    from pretrain.train import layout

    world = int(os.environ.get("WORLD_SIZE", 1))
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        config = load(arguments.config, arguments.overrides)
        if arguments.layout is not None:
            from pretrain.equivalence import layouts

            config = config.model_copy(update={"mesh": layouts.parse(arguments.layout, config, world)})
        layout.check(config, world)
        if config.engine.kind != "torch":
            raise ConfigError(
                f"engine.kind={config.engine.kind} keeps its gradients to itself: probe with engine.kind=torch"
            )
        job = processes.join(config.train.device, config.train.timeout)
        try:
            mesh = Mesh(config.mesh, job)
            config, batches = data(config, mesh, arguments.random, arguments.steps)
            lines = probe(config, job, mesh, batches, arguments.steps)
            faulty = sum(bool(line.faults) for line in lines)
            if speaks:
                report(lines, config.optimizer.kind, world, arguments.all)
            return ERROR if job.broadcast(faulty) else FINISHED
        finally:
            processes.leave()
    except (ConfigError, DataError) as error:
        if speaks:
            hint = "" if isinstance(error, ConfigError) else " (or give --random)"
            print(f"error: {error}{hint}", file=sys.stderr)
        return USAGE if isinstance(error, ConfigError) else error.exit_code


def data(config: RunConfig, mesh: Mesh, random: bool, steps: int) -> tuple[RunConfig, Batches]:
    """(the configuration with its vocabulary, micro-batches of this rank by step)."""
    from pretrain.train.build import with_vocabulary

    if random:
        from pretrain.equivalence.training import rows

        if config.model.vocabulary is None:
            config = config.model_copy(update={"model": config.model.model_copy(update={"vocabulary": 256})})
        length, size = config.data.sequence_length * config.train.micro_batch, config.model.vocabulary
        assert size is not None
        made = rows(steps, config.train.batch // config.train.micro_batch, length, size)
        return config, lambda step: made[step][mesh.dp_rank :: mesh.dp_size]
    from pretrain.data.opening import loader_of, open_sources

    corpora = open_sources(config.data, config.model.vocabulary)
    config = with_vocabulary(config, corpora[0].vocabulary_size)
    loader = loader_of(
        config.data, corpora, config.train.batch, config.train.micro_batch, mesh.dp_rank, mesh.dp_size, prefetch=0
    )
    return config, loader.batches


def report(lines: list[Line], kind: str, world: int, everything: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=140)
    table = Table(box=None, pad_edge=False)
    for title in ("parameter", "rule", "matrices", "one rank", "fp64", "values", ""):
        table.add_column(title, overflow="fold" if title == "parameter" else "ellipsis", no_wrap=title != "parameter")
    shown: set[tuple[str, str]] = set()
    for line in lines:
        alike = (line.rule, ".".join(word for word in line.name.split(".") if not word.isdigit()))
        if everything or line.faults or alike not in shown:
            values = "" if line.values is None else f"{line.values[0]:.3f} to {line.values[1]:.3f}"
            count = str(line.matrices or "")
            result = "WRONG" if line.faults else "ok"
            table.add_row(line.name, line.rule, count, f"{line.alone:.0e}", f"{line.plain:.0e}", values, result)
        shown.add(alike)
    console.print(table, markup=False, highlight=False)
    for line in lines:
        for fault in line.faults:
            console.print(f"{line.name} {fault}", markup=False, highlight=False)
    good = sum(not line.faults for line in lines)
    rules = Counter(line.rule for line in lines)
    by_rule = ", ".join(f"{count} by {rule}" for rule, count in rules.items())
    print(
        f"\n{good} of {len(lines)} parameters are updated as optimizer.kind={kind} says, on {world} rank(s): {by_rule}."
    )


if __name__ == "__main__":
    end(main)
