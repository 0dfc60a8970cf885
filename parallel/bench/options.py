"""The command line: what it may say, and what of it cannot be. Imports no torch, so that --help and mistakes are quick."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from parallel.bench.sizes import parse_sizes

DTYPES = {
    "fp32": ("float", "float32"),
    "fp64": ("double", "float64"),
    "fp16": ("half", "float16"),
    "bf16": ("bfloat16",),
    "int8": (),
    "uint8": (),
    "int32": ("int",),
    "int64": (),
}
"""Names, and how nccl-tests and torch call them."""
INTEGERS = ("int8", "uint8", "int32", "int64")
BACKENDS = ("auto", "nccl", "rccl", "gloo")
PLACES = ("native", "in", "out", "both")
PICTURES = (".png", ".svg", ".pdf")
GLOO_SIZES, GPU_SIZES = "1K:16M", "1K:1G"

SUMMARY = "Measures collectives: latency and bandwidth against message size, as nccl-tests defines them, with checked answers."
EXAMPLES = """\
examples:
  torchrun --nproc-per-node 2 -m parallel.bench
      all_reduce over all ranks, 1 KiB to 16 MiB on CPUs (gloo), to 1 GiB on GPUs (nccl, rccl)
  torchrun --nproc-per-node 8 -m parallel.bench all_reduce all_gather reduce_scatter --sizes 1K:8G --dtype bf16 --groups 2,4,8
      three collectives in groups of 2, 4 and 8 neighbours, all groups of a size at the same time
  torchrun --nnodes 16 --nproc-per-node 8 ... -m parallel.bench all --groups world,node,rail --json fabric.json --plot fabric.png
      everything, over all ranks, inside each node, and along each rail
  torchrun --nproc-per-node 4 -m parallel.bench all_reduce all_to_all --config configs/runs/X.yaml
      over every mesh axis that this training run would use
  torchrun --nproc-per-node 2 -m parallel.bench --sizes 64K,1M --place both --iterations 50
      exactly 50 iterations, in nccl-tests' own columns
  torchrun --nproc-per-node 8 -m parallel.bench all_gather --sizes 16M:256M --overlap 4096
      beside matrix products of 4096 x 4096: how much each slows the other down
  torchrun --nproc-per-node 8 -m parallel.bench --sizes 1K:1M --cuda-graph 20
      20 collectives in a CUDA graph: device time without the host's launches
  torchrun --nproc-per-node 8 -m parallel.bench pairs --help
      every pair of ranks: which link is slow, which rank

Sizes are S of nccl-tests: the whole buffer, for all_gather, reduce_scatter and all_to_all the shards of all ranks together.
GB/s are 1e9 bytes. The time of an iteration is that of the last rank; iterations run back to back; warm-up is not counted.
With one process (plain python) collectives have one rank: only algbw means something.
Ctrl-C, SIGTERM: all ranks leave after the current batch (a fraction of a second); files keep what there is, "complete": false.

Exit codes: 0 finished, 1 an answer was wrong or a rank failed, 2 bad usage, 130 Ctrl-C, 143 SIGTERM.
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong once, and not once a rank."""

    def error(self, message: str) -> NoReturn:
        if int(os.environ.get("RANK", 0)) == 0:
            super().error(message)
        raise SystemExit(2)

    def print_help(self, file: object = None) -> None:
        if int(os.environ.get("RANK", 0)) == 0:
            super().print_help()


def parser() -> argparse.ArgumentParser:
    made = _Parser(
        prog="python -m parallel.bench",
        usage="torchrun --nproc-per-node N -m parallel.bench [OP ...] [options]",
        description=SUMMARY,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = made.add_argument_group("what to measure")
    what.add_argument(
        "ops",
        nargs="*",
        metavar="OP",
        help="all_reduce reduce_scatter all_gather broadcast all_to_all all_to_all_uneven reduce send_recv (ring) "
        "send_recv_pairs barrier, or all; default all_reduce. `pairs` is another command: see pairs --help",
    )
    what.add_argument(
        "--sizes", metavar="A:B", help=f"1K:8G, 64K, or 4K,1M:64M; default {GLOO_SIZES} (gloo), {GPU_SIZES} (GPUs)"
    )
    what.add_argument("--factor", type=float, default=2, metavar="F", help="step of a range of sizes; default 2")
    what.add_argument(
        "--dtype", default="fp32", metavar="T", help=f"one or several of {','.join(DTYPES)}; default fp32"
    )
    what.add_argument("--redop", default="sum", metavar="OP", help="sum (default), prod, min, max, or avg (GPUs only)")
    what.add_argument("--root", type=int, default=0, metavar="R", help="place of the root in its group; default 0")
    what.add_argument(
        "--place",
        default="native",
        choices=PLACES,
        help="in or out of place; native (default): as torch does it; both: nccl-tests' columns",
    )
    what.add_argument(
        "--imbalance", type=float, default=4, metavar="F", help="all_to_all_uneven: most received over least; default 4"
    )
    what.add_argument(
        "--backend", default="auto", choices=BACKENDS, help="auto (default): nccl or rccl with a GPU, else gloo"
    )
    groups = made.add_argument_group("among whom")
    groups.add_argument(
        "--groups",
        metavar="G,G",
        help="world, node, rail, sizes (2,4), size:stride (4:8), mesh axes (dp,tp); default world, or all axes of a mesh",
    )
    groups.add_argument("--config", type=Path, metavar="FILE", help="take the mesh of this training config")
    groups.add_argument("--mesh", metavar="AXIS=N,...", help="a mesh (tp=2,pp=2), or changes to that of --config")
    groups.add_argument("--node-size", type=int, metavar="N", help="ranks of a node; default: what the launcher says")
    groups.add_argument(
        "--one-group", action="store_true", help="only the first group of each shape works, the others wait"
    )
    times = made.add_argument_group("how often")
    times.add_argument("--warmup", type=int, default=5, metavar="N", help="iterations before timing; default 5")
    times.add_argument("--iterations", type=int, metavar="N", help="exactly so many, instead of --confidence")
    times.add_argument(
        "--confidence",
        type=float,
        default=2,
        metavar="PERCENT",
        help="iterate until the 95%% confidence interval of the mean is +- this; default 2",
    )
    times.add_argument("--min-iterations", type=int, default=20, metavar="N", help="default 20")
    times.add_argument("--max-iterations", type=int, default=2000, metavar="N", help="default 2000")
    times.add_argument("--max-seconds", type=float, default=2, metavar="S", help="for one size; default 2")
    times.add_argument("--isolated", action="store_true", help="a barrier before every iteration, not back to back")
    times.add_argument(
        "--check", action=argparse.BooleanOptionalAction, default=True, help="check the answers; default on"
    )
    times.add_argument("--timeout", type=float, default=600, metavar="S", help="of one collective; default 600")
    gpu = made.add_argument_group("on GPUs")
    gpu.add_argument(
        "--cuda-graph", type=int, nargs="?", const=20, default=0, metavar="N", help="N collectives (20) in a CUDA graph"
    )
    gpu.add_argument(
        "--stream",
        choices=("current", "own", "side"),
        help="current (default): the one that computes; own: the process group's, asynchronously; side: another one",
    )
    gpu.add_argument("--high-priority", action="store_true", help="streams of high priority")
    more = made.add_argument_group("output")
    more.add_argument(
        "--overlap", type=int, nargs="?", const=0, metavar="M", help="beside M x M matrix products (CPU 512, GPU 4096)"
    )
    more.add_argument(
        "--hardware", type=Path, metavar="FILE", help="add the share of this hardware file's fabric ceiling"
    )
    more.add_argument("--json", type=Path, metavar="FILE", help="rows, fits and advice")
    more.add_argument("--csv", type=Path, metavar="FILE", help="rows")
    more.add_argument(
        "--plot", type=Path, metavar="FILE", help=f"time and bandwidth against size: {', '.join(PICTURES)}"
    )
    return made


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, as far as they can be judged before the job is joined. Leaves the process (2) where they cannot be."""
    made = parser()
    options = made.parse_intermixed_args(arguments)  # ops may come between options
    try:
        judge(options)
    except ValueError as error:
        made.error(str(error))
    return options


def judge(options: argparse.Namespace) -> None:
    """Turns texts into values and raises ValueError for what cannot be, whatever the job."""
    if options.sizes is not None:
        options.sizes = parse_sizes(options.sizes, options.factor)
    elif options.factor <= 1:
        parse_sizes("1", options.factor)
    options.dtypes = list(dict.fromkeys(_dtype(word) for word in options.dtype.split(",")))
    options.groups = [word.strip() for word in options.groups.split(",")] if options.groups else []
    options.mesh = [word.strip() for word in options.mesh.split(",")] if options.mesh else []
    redops = ("sum", "prod", "min", "max", "avg")
    if options.redop not in redops:
        raise ValueError(f"--redop {options.redop!r}: choose among {', '.join(redops)}")
    whole = [dtype for dtype in options.dtypes if dtype in INTEGERS]
    if options.redop == "avg" and whole:
        raise ValueError(f"--redop avg of {whole[0]} is not defined alike everywhere; choose a floating-point --dtype")
    for name, least in (
        ("warmup", 0), ("iterations", 1), ("min_iterations", 1), ("max_iterations", 1), ("cuda_graph", 0), ("root", 0),
        ("node_size", 1), ("overlap", 0),
    ):  # fmt: skip
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    for name in ("confidence", "max_seconds", "timeout"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name):g}: must be above 0")
    if options.imbalance < 1:
        raise ValueError(f"--imbalance {options.imbalance:g}: most over least is at least 1 (even)")
    if options.max_iterations < options.min_iterations:
        raise ValueError(
            f"--max-iterations {options.max_iterations} is below --min-iterations {options.min_iterations}; "
            f"lower --min-iterations too"
        )
    if options.plot is not None and options.plot.suffix.lower() not in PICTURES:
        raise ValueError(f"--plot {options.plot}: the name must end in one of {', '.join(PICTURES)}")
    if options.overlap is not None and options.cuda_graph:
        raise ValueError("--overlap launches collectives one by one; leave out --cuda-graph")


def _dtype(word: str) -> str:
    word = word.strip().lower()
    for name, others in DTYPES.items():
        if word in (name, *others):
            return name
    raise ValueError(f"--dtype {word!r}: choose among {', '.join(DTYPES)}")
