"""`python -m pretrain.checkpoint list | inspect | verify`: look at checkpoints, without the job that wrote them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EXAMPLES = """examples:
  python -m pretrain.checkpoint list runs/quickstart
  python -m pretrain.checkpoint inspect runs/quickstart --tensors
  python -m pretrain.checkpoint verify runs/quickstart/checkpoints/step_00000100
Exit codes: 0 good, 1 some checkpoints are damaged, 2 bad usage, 78 checkpoints exist but none can be loaded."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.checkpoint",
        description="Look at checkpoints and check them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    what = "a run folder, its checkpoints folder, or one checkpoint"
    one = commands.add_parser("list", help="the checkpoints of a run, newest first")
    one.add_argument("path", type=Path, metavar="RUN", help="a run folder, or its checkpoints folder")
    one = commands.add_parser("inspect", help="what a checkpoint holds (of a run: its newest)")
    one.add_argument("path", type=Path, metavar="CHECKPOINT", help=what)
    one.add_argument("--tensors", action="store_true", help="every tensor with its dtype and shape")
    one = commands.add_parser("verify", help="read every tensor, check sizes and that all numbers are finite")
    one.add_argument("path", type=Path, metavar="CHECKPOINT", help=what)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    from pretrain.checkpoint import commands  # not before: --help needs neither tables nor torch

    try:
        if arguments.command == "list":
            return commands.list_(arguments.path)
        if arguments.command == "inspect":
            return commands.inspect(arguments.path, tensors=arguments.tensors)
        return commands.verify(arguments.path)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        print(f"error: {error}", file=sys.stderr)
        return int(code)


if __name__ == "__main__":
    sys.exit(main())
