"""`python -m launch.preflight`: checks this node before a job is started on it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.exit import FINISHED
from pretrain.options import at_least, size_in_bytes

EXAMPLES = """examples:
  python -m launch.preflight --run runs/x
  python -m launch.preflight --gpus 8 --strict --json /tmp/node.json
  python -m launch.preflight --only matmul memory_test ecc kernel_log
  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint n1:29400 -m launch.preflight --peers

Exit codes: 0 nothing failed, 1 something failed, 2 bad usage, 130 interrupted. A check that lacks its tool or its device says
"not checked", which is neither. Values that may hurt are reported; nothing on the node is changed."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.preflight", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Check this node before a job is started on it: GPUs, memory, disk, network, clock, limits, environment.",
    )  # fmt: skip
    add = parser.add_argument
    # fmt: off
    add("--run", type=Path, default=Path(), metavar="FOLDER", help="the run folder, whose disk is looked at (default: here)")
    add("--gpus", type=at_least(0), metavar="N", help="how many there must be (default: what Slurm has given, if anything)")
    add("--only", nargs="+", action="extend", default=[], metavar="CHECK", help="these checks and no others")
    add("--skip", nargs="+", action="extend", default=[], metavar="CHECK", help="all checks but these")
    add("--strict", action="store_true", help="warnings are failures")
    add("--json", type=Path, metavar="FILE", help="write every result there, with its numbers")
    add("--peers", action="store_true", help="under torchrun: also the links and clocks among all ranks")
    add("--limit", type=at_least(1.0), default=60.0, metavar="S", help="for each process on a device or disk (default 60)")
    add("--since", type=at_least(1.0), default=60.0, metavar="MIN", help="of the kernel's log that is recent (default 60)")
    add("--free", type=size_in_bytes, default=10 << 30, metavar="SIZE", help="that must be free on the disk (default 10GiB)")
    add("--memory", type=size_in_bytes, metavar="SIZE",
        help="of each device to write and read back (default: 80 %% of what is free on a GPU, 256MiB on the host)")
    add("--list", action="store_true", help="print the checks with what each looks at, and leave")
    # fmt: on
    options = parser.parse_args(argv)
    for name in ("only", "skip"):  # also with commas
        setattr(options, name, [part for word in getattr(options, name) for part in word.split(",") if part])
    if options.list:
        return options
    from launch.preflight.catalogue import choose

    if options.peers and "RANK" not in os.environ:
        parser.error(
            "--peers needs ranks; start it under torchrun, as in: torchrun --nproc-per-node 2 -m launch.preflight --peers"
        )
    try:
        options.names = choose(options.only, options.skip, options.peers)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(argv: Sequence[str] | None = None, **machine: Any) -> int:
    """machine: fields of Node, for tests that put another in its place."""
    options = parse(sys.argv[1:] if argv is None else argv)
    if options.list:
        return list_checks()
    from launch.preflight.compute import STAGE_OF
    from launch.preflight.node import Node

    stages = tuple(stage for name, stage in STAGE_OF.items() if name in options.names)
    known: dict[str, Any] = {
        "folder": options.run, "limit": options.limit, "since": options.since, "free": options.free,
        "expected_gpus": options.gpus, "memory": options.memory, "stages": stages,
    }  # fmt: skip
    node = Node(**{**known, **machine})
    try:
        if options.peers:
            from launch.preflight.peers import together

            return together(options, node)
        from launch.preflight.session import alone

        return alone(options, node)
    finally:
        node.tools.close()


def list_checks() -> int:
    from rich.markup import escape
    from rich.table import Table

    from launch.preflight.catalogue import CHECKS, PEERS
    from launch.preflight.report import console

    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("looks at", overflow="fold")
    for name, looks_at in [*((check.name, check.looks_at) for check in CHECKS), *PEERS.items()]:
        table.add_row(name, escape(looks_at))
    console().print(table)
    return FINISHED


if __name__ == "__main__":
    # Ends like Ctrl-C: with the results so far, and no process left.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
