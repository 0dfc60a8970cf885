"""Times our forms of the operators against each other and against other people's implementations.

    python -m kernels.bench                                    every workload on the device at hand
    python -m kernels.bench gated_delta_net kda --forward      two workloads, forward only
    python -m kernels.bench delta_rule --shapes B1T4096H8D64   every workload of one operator, another shape
    python -m kernels.bench gla --against none --json gla.json only our own forms, all samples in a file
    python -m kernels.bench --explain --device cuda            which form would serve each request, and why not another
    python -m kernels.bench --check                            every form against its fp64 reference; 1 if one is off
    python -m kernels.bench delta_rule --tune                  search launch parameters here, write kernels/tuning
    python -m kernels.bench hardware                           what the chip does at best: has options of its own, see
                                                               python -m kernels.bench hardware --help

All contenders of a workload run in one process in turn (A, B, C, A, B, C), so that load and clocks fall on all alike; printed
are the median, half the distance of the quartiles, and "times ours": how many times longer than the first of our forms, taken
round by round. "difference" compares outputs, so that nobody wins by computing something else.
Peers are timed where they are installed: fla (Triton kernels on GPUs, plain torch on CPUs), transformers' torch forms, torch.

Exit codes: 0 finished, 1 a form failed or is off, 2 bad usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from kernels.architecture import architecture
from kernels.benching import correctness, report, tune
from kernels.benching.contenders import FAMILIES, verdicts
from kernels.benching.measure import BOTH, FORWARD, Measurement, measure
from kernels.benching.workloads import CPU_SHAPES, GPU_SHAPES, WORKLOADS, Shape, Workload, chosen
from kernels.common import products

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["hardware"]:
        from kernels.benching.hardware import command

        return command.main(words[1:])
    options = _parse(words)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.explain:
        return _explain(options)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA or ROCm device is visible: use --device cpu, or --explain", file=sys.stderr)
        return 2
    conditions = report.machine(options.device)
    with products.kept():
        if options.device.type == "cpu" and not (options.check or options.tune):
            try:
                conditions["fp32_products"] = products.choose(options.fp32_products)
            except ValueError as error:
                print(error, file=sys.stderr)
                return 2
        print(report.describe(conditions), flush=True)
        if options.check:
            return _check(options)
        if options.tune:
            return _tune(options, conditions)
        return _time(options, conditions)


def _time(options: argparse.Namespace, conditions: dict) -> int:
    measurements: list[Measurement] = []
    for workload in options.workloads:
        for shape in options.shapes:
            found = measure(
                workload,
                shape,
                options.dtype,
                options.device,
                options.modes,
                families=options.against,
                reference=options.reference,
                rounds=options.rounds,
                budget=options.budget,
            )
            report.print_table(report.HEADINGS, [report.row(m) for m in found], sys.stdout)
            measurements += found
    lines = report.linearity(measurements)
    if lines:
        report.print_table(report.LINEARITY_HEADINGS, lines, sys.stdout)
    conditions["load_after"] = report.machine(options.device)["load"]
    if options.json is not None:
        options.json.write_text(json.dumps(report.as_json(conditions, measurements), indent=1) + "\n")
    failed = [m for m in measurements if m.note.startswith("FAILED")]
    for m in failed:
        print(f"{m.contender} failed on {m.workload} {m.shape} {m.mode}: {m.note}", file=sys.stderr)
    return 1 if failed else 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "op",
        nargs="*",
        help=f"workloads ({', '.join(WORKLOADS)}) or operators ({', '.join(_operators())}); default all",
    )
    add("--shapes", nargs="+", metavar="SHAPE", help="such as B1T8192H4D128; default: two on CPUs, six on GPUs")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--dtype", choices=DTYPES, help="default: fp32 on CPUs, bf16 on GPUs")
    add("--forward", action="store_true", help="time the forward pass only")
    add("--backward", action="store_true", help="time forward and backward together only")
    add("--against", help=f"peers, separated by commas: {','.join(FAMILIES)}; or none; default: the usual ones")
    add("--reference", action="store_true", help="time the reference loops too")
    add("--rounds", type=int, help="calls of each contender; default 7 on CPUs, 30 on GPUs")
    add("--budget", type=float, default=30.0, help="seconds a table row group may take after 3 rounds; default 30")
    add("--threads", type=int, help="CPU threads; default torch's own choice")
    add(
        "--fp32-products",
        choices=get_args(products.Library),
        default="auto",
        help="library that multiplies fp32 matrices on a CPU, for all contenders; default auto, as our runs have it "
        "(cpu.fp32_products)",
    )
    add("--json", type=Path, metavar="FILE", help="write all samples and the conditions to FILE")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--explain", action="store_true", help="say which form serves each request and why not another")
    task.add_argument("--check", action="store_true", help="compare every form with its reference in fp64")
    task.add_argument("--tune", action="store_true", help="search launch parameters and write the tuning table")
    options = parser.parse_args(arguments)
    if "hardware" in options.op:
        parser.error("hardware is a command of its own: python -m kernels.bench hardware [options]")
    try:
        options.workloads = chosen(options.op)
        options.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        gpu = options.device.type == "cuda"
        options.shapes = [Shape.parse(text) for text in options.shapes or (GPU_SHAPES if gpu else CPU_SHAPES)]
        options.against = _families(options.against)
    except ValueError as error:
        parser.error(str(error))
    options.dtype = DTYPES[options.dtype or ("bf16" if gpu else "fp32")]
    options.rounds = options.rounds or (30 if gpu else 7)
    if options.rounds < 1 or options.budget < 0:
        parser.error("--rounds must be at least 1 and --budget not negative")
    options.modes = [FORWARD] * (not options.backward or options.forward) + [BOTH] * (
        not options.forward or options.backward
    )
    return options


def _operators() -> list[str]:
    return sorted({workload.op for workload in WORKLOADS.values()})


def _families(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    if text == "none":
        return ()
    names = tuple(text.split(","))
    for name in names:
        if name not in FAMILIES:
            raise ValueError(f"--against {name!r} is unknown; choose among {', '.join(FAMILIES)}, or none")
    return names


def _explain(options: argparse.Namespace) -> int:
    rows = []
    for workload in options.workloads:
        for shape in options.shapes:
            for form, verdict in verdicts(workload, shape, options.dtype, options.device):
                rows.append((workload.name, str(shape), str(options.device), form, verdict))
    report.print_table(("workload", "shape", "device", "form", "verdict"), rows, sys.stdout)
    return 0


def _check(options: argparse.Namespace) -> int:
    headings = ("workload", "case", "form", "tensor", "error", "allowed", "verdict")
    rows, failed = [], 0
    for c in correctness.compare(options.workloads, options.device):
        failed += not c.passed
        verdict = "ok" if c.passed else f"OFF {c.note}".strip()
        rows.append((c.workload, c.case, c.form, c.tensor, f"{c.error:.1e}", f"{c.tolerance:.0e}", verdict))
    report.print_table(headings, rows, sys.stdout)
    print(f"{len(rows)} comparisons, {failed} off")
    return 1 if failed or not rows else 0


def _tune(options: argparse.Namespace, conditions: dict) -> int:
    arch = architecture(options.device)
    if arch == "generic":
        print(f"{conditions['device']} is not an architecture with a tuning table", file=sys.stderr)
        return 2
    written = 0
    for workload in options.workloads:
        for shape in options.shapes:
            written += _tune_one(workload, shape, options, conditions, arch)
    print(f"{written} rows written to {tune.tuning.FOLDER / (arch + '.json')}; now run python -m kernels.check")
    return 0


def _tune_one(workload: Workload, shape: Shape, options: argparse.Namespace, conditions: dict, arch: str) -> int:
    serving = next(
        form for form, verdict in verdicts(workload, shape, options.dtype, options.device) if verdict == "chosen"
    )
    if serving != "triton":
        print(f"{workload.name} {shape}: served by the {serving} form, nothing to tune")
        return 0
    choices = tune.tune(
        workload,
        shape,
        options.dtype,
        options.device,
        rounds=options.rounds,
        say=lambda line: print(line, flush=True),
    )
    where = f"{workload.name} {shape}, {conditions['device']}, commit {conditions['commit']}"
    return tune.write(arch, choices, where)


if __name__ == "__main__":
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages, as our runs have them (pretrain/main.py)
    sys.exit(main())
