"""Command-line options shared by the commands that use a trained model. Light: --help does not wait for torch."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
         "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, --device and where the weights are kept."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="a run folder (its newest checkpoint) or a checkpoint"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--memory-limit",
        type=memory_limits,
        metavar="SIZE[,cpu=SIZE]",
        help="weights that a device may hold, such as 16GiB or 0=16GiB,1=8GiB,cpu=64GiB (without a name: each GPU, or "
        "the CPU when there is none); layers beyond it wait in CPU memory, then on disk, and visit the device in turn",
    )
    parser.add_argument(
        "--offload",
        metavar="FOLDER",
        help="where layers that fit nowhere wait; a subfolder is made here and removed at the end",
    )


def memory_limits(text: str) -> dict[int | str, int]:
    """ "2GiB,cpu=8GiB" -> {"each": 2147483648, "cpu": 8589934592}; `0=`, `cuda:0=` name single GPUs."""
    limits: dict[int | str, int] = {}
    for part in text.split(","):
        name, given, size = part.rpartition("=")
        key = name.strip().removeprefix("cuda:") if given else "each"
        if key not in ("each", "cpu") and not key.isdigit():
            raise argparse.ArgumentTypeError(f"{part!r}: {name!r} is no device; write cpu=SIZE, 0=SIZE, or SIZE alone")
        device = int(key) if key.isdigit() else key
        if device in limits:
            raise argparse.ArgumentTypeError(f"{text!r} limits the same device twice")
        limits[device] = size_in_bytes(size)
    return limits


def size_in_bytes(text: str) -> int:
    """ "1.5GiB" -> 1610612736."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 512MiB, 2GiB, 16GB or a number of bytes")
    return int(float(match[1]) * UNITS[match[2].lower()])


def at_least(smallest: float) -> Callable[[str], float]:
    """An argument type: a number of the kind of `smallest`, not below it."""
    kind = type(smallest)

    def read(text: str) -> float:
        value = kind(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"{text} is below {smallest}")
        return value

    read.__name__ = kind.__name__
    return read


def list_of(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argument type: several values, separated by commas."""

    def read(text: str) -> list[Any]:
        return [one(part.strip()) for part in text.split(",")]

    read.__name__ = f"list of {one.__name__}"
    return read


def share(text: str) -> float:
    """An argument type: a number above 0 and at most 1."""
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def exit_code(error: Exception) -> int:
    """Prints one line for an error that a user can mend and returns its exit code; raises any other error again."""
    code = getattr(error, "exit_code", 2 if isinstance(error, ValueError) else None)
    if code is None:
        raise error
    print(f"error: {error}", file=sys.stderr)
    return int(code)
