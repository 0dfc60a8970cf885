"""Compiles every Triton kernel without a GPU, and fails on kernels that would be slow or would not run.

    python -m kernels.check                                     gfx942 and sm90, all operators
    python -m kernels.check --arch gfx950 --op delta_rule       one of each
    python -m kernels.check --arch all --json figures.json      everything, with all figures in a file
    python -m kernels.check --mutate                            plants faults and shows that each one is caught

Needs neither GPU nor driver: triton brings the compilers for AMD and NVIDIA. Each operator's public function is
called on CPU tensors, forward and backward, for representative requests and for every row of the tuning table; each
launch becomes a compilation. A kernel fails on register spills, scratch memory, matrix products without matrix
instructions, shared memory over the limit, less than one warp per SIMD, a failed compilation, and on any figure that
cannot be read. It says nothing about speed, races or results.

Exit codes: 0 no faults, 1 faults, 2 bad usage.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from kernels.architecture import ARCHITECTURES
from kernels.dispatch import interpreting
from kernels.offline import report
from kernels.offline.sweep import Result, operators, sweep, unknown_kernels

TARGETS = tuple(name for name, arch in ARCHITECTURES.items() if arch.vendor != "none")
USUAL = ("gfx942", "sm90")
Job = tuple[str, str]  # architecture, operator
Outcome = tuple[Job, list[Result], set[str]]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if importlib.util.find_spec("triton") is None:
        print("triton is not installed: pip install triton (any machine; no GPU is needed)", file=sys.stderr)
        return 2
    if interpreting():
        print("unset TRITON_INTERPRET: interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    began = time.perf_counter()
    results = _mutate(options.arch) if options.mutate else _check(options.arch, options.op, options.jobs)
    seconds = time.perf_counter() - began
    report.print_table(results, sys.stdout)
    faulty = report.print_problems(results, sys.stdout)
    kernels = sum(result.figures is not None for result in results)
    print(f"{kernels} kernels on {', '.join(options.arch)} in {seconds:.0f} s, {faulty} at fault")
    if options.json is not None:
        options.json.write_text(json.dumps(report.as_json(results, seconds), indent=1) + "\n")
    if kernels == 0 and not faulty:
        print("nothing was compiled: none of the chosen operators has a Triton form")
    return 1 if faulty else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m kernels.check",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arch",
        action="append",
        choices=[*TARGETS, "all"],
        help=f"compile for this architecture; may be repeated; default {' and '.join(USUAL)}",
    )
    parser.add_argument(
        "--op", action="append", choices=operators(), help="only this operator; may be repeated; default all"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure and every fault to FILE")
    parser.add_argument("--mutate", action="store_true", help="check the checker: compile kernels with planted faults")
    cores = min(2, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=cores, metavar="N", help="processes; default %(default)s")
    options = parser.parse_args(arguments)
    options.arch = list(dict.fromkeys(options.arch or USUAL))
    if "all" in options.arch:
        options.arch = list(TARGETS)
    options.op = list(dict.fromkeys(options.op or operators()))
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    return options


def _check(architectures: Sequence[str], ops: Sequence[str], processes: int) -> list[Result]:
    jobs = [(arch, op) for op in ops for arch in architectures]
    found: dict[Job, list[Result]] = {}
    asked: dict[str, set[str]] = {arch: set() for arch in architectures}
    for job, results, names in _run(jobs, processes):
        found[job] = results
        asked[job[0]] |= names
        if any(result.figures is not None or result.problems for result in results):
            faulty = sum(bool(result.problems) for result in results)
            print(f"{job[0]} {job[1]}: {len(results)} kernels, {faulty} at fault", file=sys.stderr, flush=True)
    ordered = [result for arch in architectures for op in ops for result in found[arch, op]]
    if set(ops) == set(operators()):  # a part of the operators cannot know all names
        for arch in architectures:
            ordered += unknown_kernels(arch, asked[arch])
    return ordered


def _run(jobs: Sequence[Job], processes: int) -> Iterator[Outcome]:
    """All jobs in a pool of processes. A compiler that aborts takes its process along: then each job gets its own."""
    context = multiprocessing.get_context("spawn")  # nothing inherited: no driver, no thread pools
    left = list(jobs)
    try:
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            futures = [pool.submit(_job, job) for job in jobs]
            for future in as_completed(futures):
                outcome = future.result()
                left.remove(outcome[0])
                yield outcome
        return
    except BrokenProcessPool:
        print("a compiler took its process down; going on with one process per operator", file=sys.stderr)
    for job in left:
        try:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                yield pool.submit(_job, job).result()
        except BrokenProcessPool:
            arch, op = job
            text = "the compiler ended the process (an abort inside LLVM or out of memory): see its message above"
            yield job, [Result(arch, op, "", "", problems=[("compile", text)])], set()


def _job(job: Job) -> Outcome:
    import torch

    torch.set_num_threads(1)  # the work is the compilers'; torch only allocates
    arch, op = job
    results, asked = sweep(op, arch)
    return job, results, asked


def _mutate(architectures: Sequence[str]) -> list[Result]:
    """Runs the planted faults. What is reported as faulty afterwards is the checker itself."""
    from kernels.offline import faults

    results = []
    for arch in architectures:
        for fault, result, right in faults.run(arch):
            found = ", ".join(dict.fromkeys(kind for kind, _ in result.problems)) or "nothing"
            wanted = fault.expected or "nothing"
            result.note = f"found {found}: {'right' if right else 'WRONG, expected ' + wanted}"
            text = f"{fault.name}: the checker found {found}, expected {wanted}"
            result.problems = [] if right else [("missed", text)]
            results.append(result)
    return results


if __name__ == "__main__":
    sys.exit(main())
