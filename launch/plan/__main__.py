"""`python -m launch.plan`: what a job would cost and how fast it would be, on up to 100 000 GPUs, from a laptop."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EXAMPLES = """examples:
  python -m launch.plan --config configs/models/zaya1_8b.yaml --hardware configs/hardware/mi300x.yaml --gpus 1024
  python -m launch.plan --config configs/runs/X.yaml --hardware configs/hardware/h100.yaml --gpus 64 mesh.tp=8 train.micro_batch=2
  python -m launch.plan --config configs/models/qwen3_next_80b.yaml --hardware configs/hardware/h200.yaml --gpus 512 --search
  python -m launch.plan --config configs/models/zaya1_8b.yaml --hardware configs/hardware/mi300x.yaml --gpus 1024 \\
      --sweep gpus --plot scaling.png

With --search, keys that are given (mesh.tp=8, engine.kind=deepspeed, train.micro_batch=1) stay, all others are chosen.
A model file is planned as a run of 4 sequences of 4096 tokens a GPU and step: change train.batch, data.sequence_length, --tokens.
Exit codes: 0 planned, 1 planned, but it does not fit, 2 bad usage or configuration."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    from pretrain.options import at_least, share

    parser = argparse.ArgumentParser(
        prog="python -m launch.plan",
        description="Predict memory, speed and failures of a training job.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", required=True, type=Path, metavar="FILE", help="a run file or a model file")
    add("--hardware", required=True, type=Path, metavar="FILE", help="a file of configs/hardware/")
    add("--gpus", required=True, type=at_least(1), metavar="N", help="how many, up to 100000")
    add("overrides", nargs="*", metavar="key=value", help="any field by its dotted name: mesh.tp=8")
    add("--search", action="store_true", help="find the best layouts, and say why the others lose")
    add("--top", type=at_least(1), default=10, metavar="N", help="rows of the ranking; default 10")
    add(
        "--sweep",
        type=_sweep,
        metavar="gpus[=N,N,...]",
        help="scaling curves over numbers of GPUs; default: 11 numbers from 1 to 100000",
    )
    add(
        "--keep-layout",
        action="store_true",
        help="--sweep with the configuration's layout, not the best one for each number",
    )
    add("--tokens", type=_tokens, metavar="N", help="of the whole run, such as 12T; default: the run file's steps")
    add("--node-mtbf", type=_span, metavar="TIME", help="mean time between failures of a node, such as 6300h or 200d")
    add(
        "--save-seconds",
        type=at_least(0.0),
        metavar="S",
        help="how long a save stops training; default: from its bytes",
    )
    add("--storage-gbs", type=_positive, default=100.0, metavar="GB/S", help="what storage takes in all; default 100")
    add(
        "--restart-seconds",
        type=at_least(0.0),
        default=300.0,
        metavar="S",
        help="from a failure to the next step; default 300",
    )
    add(
        "--efficiency",
        type=share,
        metavar="SHARE",
        help="of the nominal matrix rate, instead of measured or usual values",
    )
    add(
        "--overlap",
        type=_share_or_none,
        metavar="SHARE",
        help="of the computation that may hide messages; default 1, on CPUs 0",
    )
    add(
        "--headroom",
        type=_share_or_none,
        default=0.05,
        metavar="SHARE",
        help="of the memory that stays free; default 0.05",
    )
    add("--plot", type=Path, metavar="FILE", help="a picture of --sweep or --search (.png, .svg, .pdf)")
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the numbers (- for the standard output, and nothing else there)",
    )
    add(
        "--no-cache",
        action="store_true",
        help="neither use nor keep what earlier plans have found out about the layers",
    )
    add("--verbose", action="store_true", help="print every assumption")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    from launch.plan import command
    from pretrain.exit import USAGE, Exit

    try:
        return command.run(arguments)
    except (ValueError, Exit) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", USAGE)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _sweep(text: str) -> list[int] | None:
    what, given, numbers = text.partition("=")
    if what != "gpus":
        raise argparse.ArgumentTypeError(f"{text!r}: write gpus, or gpus=8,64,512")
    try:
        counts = sorted({int(number) for number in numbers.split(",")}) if given else []
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: {numbers!r} is no list of whole numbers; write gpus=8,64,512"
        ) from None
    if counts and not 1 <= counts[0] <= counts[-1] <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers of GPUs from 1 to 100000")
    return counts


def _tokens(text: str) -> float:
    number = _scaled(text, {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12})
    if number is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; write 300B, 12T or 1e12")
    return number


def _span(text: str) -> float:
    """Seconds."""
    number = _scaled(text, {"S": 1.0, "": 3600.0, "H": 3600.0, "D": 86400.0, "Y": 365.0 * 86400.0})
    if number is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 6300h, 260d or 2y")
    return number


def _scaled(text: str, units: dict[str, float]) -> float | None:
    unit = text[-1:].upper() if text[-1:].isalpha() else ""
    try:
        number = float(text[: len(text) - len(unit)]) * units[unit]
    except (ValueError, KeyError):
        return None
    return number if 0.0 < number < float("inf") else None


def _positive(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _share_or_none(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
