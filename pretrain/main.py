"""Trains a model: `torchrun --nproc-per-node N pretrain/main.py --config configs/runs/X.yaml [key=value ...]`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if sys.path and Path(sys.path[0] or ".").resolve() == ROOT / "pretrain":
    sys.path[0] = str(ROOT)  # a script's own folder comes first, where `data`, `model`, ... would hide other packages

EXAMPLES = """examples:
  python pretrain/main.py --config configs/runs/quickstart.yaml
  torchrun --nproc-per-node 2 pretrain/main.py --config configs/runs/quickstart.yaml train.micro_batch=4 run=runs/two
  deepspeed pretrain/main.py --config configs/runs/quickstart.yaml engine.kind=deepspeed engine.stage=2
  python pretrain/main.py --config configs/runs/quickstart.yaml --print-config

A run that was interrupted goes on from its newest checkpoint when the same command is given again.
Exit codes: 0 finished, 1 error, 2 bad usage or configuration, 75 preempted after a save (run again), 76 hang, 77 corrupt or
missing data, 78 no loadable checkpoint although some exist, 79 persistent numerical fault."""


# Idle OpenMP threads spin for microseconds only, then sleep: left to spin, they slow a step down many times over on a machine
# that does anything else at the same time. OpenMP reads this when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Large tensors on a CPU ask for large pages where the system leaves it to programs; steps are 2 to 10 % shorter. torch reads
# this at its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

GRACE = 2.0  # seconds that other ranks leave after rank 0: with the first to leave, torchrun ends all, also one about to speak


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pretrain/main.py", description="Train a language model.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file of configs/runs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="any field by its dotted name: train.steps=100"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and leave")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what the run would cost and leave; needs no devices"
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="end with 78 if the newest checkpoint is damaged, instead of going on from the one before",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    parser.add_argument(
        "--unwatched",
        action="store_true",
        help="train in this very process, for profilers and debuggers: no watchdog, signals seen between steps only",
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.print_config or arguments.dry_run or arguments.unwatched:
        return run(arguments)
    from pretrain.watch.start import watched  # before torch, pydantic and their threads, which no fork survives

    return watched(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    from pretrain import config as configuration
    from pretrain.train import heartbeat

    try:
        strict = ["checkpoint.strict=true"] if arguments.strict else []
        config = configuration.load(arguments.config, [*arguments.overrides, *strict])
        if arguments.print_config:
            print(configuration.dump(config), end="")
            return 0
        if arguments.dry_run:
            from pretrain.estimate.report import report

            print(report(config))
            return 0
        from pretrain.train.loop import train

        return train(config)
    except configuration.ConfigError as error:
        heartbeat.error(error)
        return fail(str(error), 2)
    except Exception as error:
        heartbeat.error(error)
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        return fail(str(error), code)


def fail(message: str, code: int) -> int:
    """Rank 0 speaks, for all ranks leave with the same error; but what is wrong with data, perhaps one rank alone has seen."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {message}", file=sys.stderr)
    else:
        if code == 77:
            print(f"error on rank {rank}: {message}", file=sys.stderr)
        time.sleep(GRACE)
    return code


if __name__ == "__main__":
    from parallel.ending import end

    end(main)
