"""`python -m pretrain.checkpoint list | inspect | verify | ...`: checkpoints, without the job that wrote them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pretrain.checkpoint.interop import FORMATS
from pretrain.options import at_least, size_in_bytes

EXAMPLES = """examples:
  python -m pretrain.checkpoint list runs/quickstart
  python -m pretrain.checkpoint inspect runs/quickstart --tensors
  python -m pretrain.checkpoint verify runs/quickstart/checkpoints/step_00000100
  python -m pretrain.checkpoint export runs/llama --out exported/llama --dtype bf16
  python -m pretrain.checkpoint import downloads/some_model --out runs/imported
  python -m pretrain.checkpoint bench --size 1GiB --folder /scratch
  python -m pretrain.checkpoint bench --steps --size 256MiB --step-seconds 2
Exit codes: 0 good, 1 some checkpoints or files are damaged, 2 bad usage, or a model that a format cannot express,
78 checkpoints exist but none can be loaded."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.checkpoint",
        description="Look at checkpoints, check them, and exchange models with Hugging Face folders.",
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
    one = commands.add_parser("export", help="write a model as a Hugging Face folder")
    one.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT", help=what)
    one.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    one.add_argument(
        "--format",
        default="auto",
        metavar="FORMAT",
        help=f"{', '.join(FORMATS)}; auto (default) takes the first that fits",
    )
    one.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights (default fp32)")
    one.add_argument(
        "--shard-size",
        type=size_in_bytes,
        default=4 << 30,
        metavar="SIZE",
        help="most bytes in one file (default 4GiB)",
    )
    one = commands.add_parser("import", help="make a run folder of a Hugging Face folder")
    one.add_argument("path", type=Path, metavar="HF_FOLDER", help="config.json, safetensors files, a tokenizer")
    one.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new run folder")
    one = commands.add_parser(
        "bench", help="time saves and loads against the bare disk and torch.distributed.checkpoint"
    )
    one.add_argument("--size", type=size_in_bytes, default=1 << 30, help="of the state (default 1GiB)")
    one.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure (default: here)")
    one.add_argument("--rounds", type=at_least(1), default=5, metavar="N", help="turns of each (default 5)")
    one.add_argument("--steps", action="store_true", help="instead: what a save beside training costs the steps")
    one.add_argument(
        "--step-seconds", type=at_least(0.001), default=0.5, metavar="S", help="of a step, with --steps (default 0.5)"
    )
    one.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    from pretrain.checkpoint import commands  # not before: --help needs neither tables nor torch

    try:
        if arguments.command == "bench":
            from pretrain.checkpoint.bench import bench

            return bench(
                arguments.size,
                arguments.folder,
                arguments.rounds,
                arguments.steps,
                arguments.step_seconds,
                arguments.json,
            )
        if arguments.command == "list":
            return commands.list_(arguments.path)
        if arguments.command == "inspect":
            return commands.inspect(arguments.path, tensors=arguments.tensors)
        if arguments.command == "export":
            return commands.export(
                arguments.path, arguments.out, arguments.format, arguments.dtype, arguments.shard_size
            )
        if arguments.command == "import":
            return commands.import_(arguments.path, arguments.out)
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
