"""`torchrun --nproc-per-node N -m pretrain.equivalence --config X`: proves that a model trains the same on every layout of ranks.

Each layout takes a few steps on the same batches as one rank alone, in fp32. Loss, gradient norm, every parameter's gradient,
every update and every expert's load are compared by name; where fp32 leaves a doubt, fp64 settles it. A lost reduction or a
gradient counted twice usually leaves the loss looking normal; it does not pass this.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.ending import end
from pretrain.exit import ERROR, FINISHED, USAGE

if TYPE_CHECKING:
    from pretrain.config import RunConfig
    from pretrain.equivalence.compare import Verdict

EXAMPLES = """examples:
  torchrun --nproc-per-node 2 -m pretrain.equivalence --config configs/runs/quickstart.yaml
  torchrun --nproc-per-node 4 -m pretrain.equivalence --config configs/models/zaya1_8b.yaml --layouts tp=2,ep=4 pp=2,cp=2
  torchrun --nproc-per-node 8 -m pretrain.equivalence --config configs/models/qwen3_next_80b.yaml --sample 20
  torchrun --nproc-per-node 4 -m pretrain.equivalence --config configs/runs/quickstart.yaml --optimizer muon
  python -m pretrain.equivalence --config configs/models/kimi_linear_48b.yaml --list 8

A layout is written as the mesh section of a run: sizes of pp, dp, replicate, cp, tp, ep (what is left over is dp), and
expert_tensor=true, context=ring, pp_schedule=interleaved or zbv. The model is shrunk to a laptop's size, keeping every kind of
sublayer and every option; the table says how. Without accelerators ranks are processes on the CPU.
Exit codes: 0 all layouts agree with one rank, 1 one differs, 2 bad usage or configuration."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.equivalence",
        description="Compare training on every layout of the ranks with training on one: loss, gradients and updates by name.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="a run file or a model file")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--layouts",
        nargs="+",
        metavar="LAYOUT",
        help="such as tp=2,cp=2; default: every one that model and ranks allow",
    )
    which.add_argument("--sample", type=int, metavar="N", help="N of those, drawn at random (always the same ones)")
    which.add_argument(
        "--list", type=int, metavar="RANKS", help="print the layouts of so many ranks, and compare nothing"
    )
    parser.add_argument(
        "--engine",
        choices=("torch", "deepspeed"),
        default="torch",
        help="deepspeed: gradients stay inside (default torch)",
    )
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), help="of ZeRO, with --engine deepspeed (default 2)")
    parser.add_argument(
        "--optimizer", choices=("adamw", "muon", "lamb", "sgd"), default="adamw", help="what updates (default adamw)"
    )
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="steps of each layout (default 2)")
    parser.add_argument("--length", type=int, default=64, metavar="N", help="tokens of a packed row (default 64)")
    parser.add_argument("--as-it-is", action="store_true", help="do not shrink the model")
    arguments = parser.parse_args(argv)
    for option in ("steps", "length", "sample", "list"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            parser.error(f"--{option} {value}: give a number of at least 1")
    if arguments.stage is not None and arguments.engine != "deepspeed":
        parser.error("--stage is of --engine deepspeed")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    from parallel import processes
    from pretrain.config import ConfigError
    from pretrain.equivalence import layouts
    from pretrain.equivalence.gate import judge

    world = arguments.list or int(os.environ.get("WORLD_SIZE", 1))
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        if world == 1 and not arguments.list:
            raise ConfigError(
                "one rank has nothing to be compared with; start several: "
                "torchrun --nproc-per-node 2 -m pretrain.equivalence ..."
            )
        config, said = configuration(arguments, world)
        if arguments.layouts is not None:
            meshes = [layouts.parse(text, config, world) for text in arguments.layouts]
        else:
            meshes = layouts.legal(config, world)
            if arguments.sample and arguments.sample < len(meshes):
                drawn = set(random.Random(0).sample(range(len(meshes)), arguments.sample))
                meshes = [mesh for index, mesh in enumerate(meshes) if index in drawn]
    except ConfigError as error:
        if speaks:
            print(f"error: {error}", file=sys.stderr)
        return USAGE
    if arguments.list:
        print("\n".join(layouts.name(mesh, world) for mesh in meshes))
        return FINISHED

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    job = processes.join(config.train.device)
    try:
        verdicts = judge(config, meshes, job, say)
        differing = sum(not verdict.agrees for verdict in verdicts.values())
        if speaks:
            _report(verdicts, said, world)
        return ERROR if job.broadcast(differing) else FINISHED
    finally:
        processes.leave()


def configuration(arguments: argparse.Namespace, world: int) -> tuple[RunConfig, list[str]]:
    """(a short fp32 run of the model that a file describes, how it was shrunk). Raises ConfigError."""
    from pydantic import ValidationError

    from pretrain.config import ConfigError, explain, read_yaml
    from pretrain.equivalence.gate import short_run
    from pretrain.equivalence.shrink import VOCABULARY, shrink
    from pretrain.model.decoder import DecoderConfig
    from pretrain.model.files import model_section

    raw = read_yaml(arguments.config)
    try:
        section = model_section(raw.get("model"), arguments.config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(section, dict):
        raise ConfigError(f"{arguments.config}: has no section `model:`; give a model file or a run file")
    try:
        model = DecoderConfig.model_validate(section)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{arguments.config}: model.{line}" for line in explain(error, section))) from None
    said: list[str] = []
    if not arguments.as_it_is:
        model, said = shrink(model, world)
    elif model.vocabulary is None:
        model = model.model_copy(update={"vocabulary": VOCABULARY})
    engine = {"kind": arguments.engine} | ({"stage": arguments.stage} if arguments.stage else {})
    return short_run(model, world, engine, arguments.steps, arguments.length, arguments.optimizer), said


def _report(verdicts: dict[str, Verdict], said: list[str], world: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=120)
    if said:
        console.print(f"The model was shrunk: {'; '.join(said)}.\n", markup=False, highlight=False)
    table = Table(box=None, pad_edge=False)
    for title in ("layout", "loss", "norm", "gradient", "where", "update", ""):
        table.add_column(title, overflow="fold" if title == "layout" else "ellipsis", no_wrap=title != "layout")
    for name, verdict in verdicts.items():
        kinds = ("loss", "norm", "gradient", "update")
        found = [getattr(verdict, kind) for kind in kinds]
        loss, norm, gradient, update = (f"{one.error:.0e}" if one.where else "-" for one in found)
        result = "DIFFERS" if not verdict.agrees else "equal" if verdict.double is None else "equal in fp64"
        table.add_row(name, loss, norm, gradient, verdict.gradient.where, update, result)
    console.print(table, markup=False, highlight=False)
    for name, verdict in verdicts.items():
        for fault in [] if verdict.agrees else verdict.faults():
            console.print(f"{name}: {fault}", markup=False, highlight=False)
        if verdict.double is not None and verdict.agrees:
            error = max(verdict.double.gradient, verdict.double.update)
            console.print(
                f"{name}: fp32 is rounding; in fp64 gradients and updates differ by {error.error:.0e} at most"
            )
    agreeing = sum(verdict.agrees for verdict in verdicts.values())
    console.print(f"\n{agreeing} of {len(verdicts)} layouts of {world} ranks train as one rank does.", highlight=False)


if __name__ == "__main__":
    end(main)
