"""What this chip does at best: memory bandwidth and matrix products.

    python -m kernels.bench hardware                            everything, on the device at hand
    python -m kernels.bench hardware --quick                    few sizes: the ceilings within a minute
    python -m kernels.bench hardware memory --arrays 1M:4G      bandwidth only, arrays of 1 MiB, 4 MiB, ... 4 GiB
    python -m kernels.bench hardware matmul --dtypes bf16,fp8   products only, two dtypes
    python -m kernels.bench hardware matmul --shapes 16384x4096x2048,16384x2048x4096
                                                                besides the grid, the shapes of your model
    python -m kernels.bench hardware --json chip.json --plot chip.png
    python -m kernels.bench hardware --write configs/hardware/mi300x.yaml
                                                                puts the ceilings into that file, or a new one
    python -m kernels.bench hardware --device cpu --threads 1 --write cpu.yaml

Memory: copy c = a, mul b = sc, add c = a + b, triad a = b + sc, dot a.b over arrays of fp64, with the byte counts of STREAM and
BabelStream. The figure for memory is the best over arrays of at least four times the largest cache.

Products: [M, K] x [K, N] in the layouts of a linear layer's three products: nt forward, nn gradient of the input, tn gradient of
the weight. A ceiling is the best median over all shapes. The plateau is the smallest work, 2MNK, with which a product reaches
90 % of it, and that from which half of all products do. On a GPU caches are flushed before each product.

Every answer is checked. Ctrl-C ends early with what is there (and writes no hardware file). The training run measures its
mfu_measured against the ceiling that its hardware file holds, if that was taken on the same device and threads.

Exit codes: 0 finished, 1 an answer was wrong or nothing ran, 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.benching import report as bench_report
from kernels.benching.hardware import bandwidth, dtypes, machine, matmul, plateau, plot, report, section
from kernels.benching.hardware.arguments import integers, names
from kernels.benching.hardware.clock import Clock
from kernels.benching.hardware.progress import Progress

PARTS = ("memory", "matmul")
LIBRARIES = {
    "cuda": ("default", "cublas", "cublaslt", "hipblas", "hipblaslt", "ck"),
    "cpu": ("default", "blas", "onednn"),
}


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    conditions = bench_report.machine(options.device) | _settings(options)
    print(bench_report.describe(conditions), flush=True)
    for line in options.remarks + _busy(conditions):
        print(line, flush=True)
    cache = machine.cache_bytes(options.device)
    streams: list[bandwidth.Stream] = []
    products: list[matmul.Product] = []
    complete = _measure(options, streams, products)
    rates, found = bandwidth.ceilings(streams, cache), plateau.ceilings(products)
    report.memory(streams, rates, cache, sys.stdout)
    layouts = [x for x in options.layouts if any(row.layout == x for row in products)]
    report.matmul(products, found, options.shapes, layouts, sys.stdout)
    conditions["load_after"] = [round(value, 2) for value in os.getloadavg()]
    if options.json is not None:
        content = report.as_json(conditions, streams, rates, cache, products, found, complete=complete)
        options.json.write_text(json.dumps(content, indent=1) + "\n")
        print(f"wrote {options.json}")
    if options.plot is not None and (streams or products):
        plot.draw(options.plot, _title(conditions), streams, products, found, cache)
        print(f"wrote {options.plot}")
    wrong = sum(bool(s.wrong) for s in streams) + sum(row.note.startswith("WRONG") for row in products)
    if not complete:
        print("interrupted: these are the results so far" + _unwritten(options), file=sys.stderr)
        return 130
    if wrong or not (rates or found):
        print(f"{wrong} answers are WRONG" if wrong else "nothing ran", end="", file=sys.stderr)
        print(_unwritten(options), file=sys.stderr)
        return 1
    if options.write is not None:
        try:
            print(_write(options, conditions, rates, found, products))
        except (ValueError, OSError) as error:
            print(f"{error}{_unwritten(options)}", file=sys.stderr)
            return 1
    return 0


def _measure(options: argparse.Namespace, streams: list, products: list) -> bool:
    """Fills both lists; whether it came to the end."""
    clock = Clock(options.device, options.rounds, flush=not options.no_flush)
    progress = Progress()
    try:
        if "memory" in options.parts:
            count = len(options.arrays) * len(bandwidth.ARRAYS)
            progress.say(f"memory: 0 of {count}")
            for stream in bandwidth.measure(options.arrays, clock):
                streams.append(stream)
                size = f"{stream.array_bytes >> 10} KiB"
                progress.say(f"memory {len(streams)} of {count}: {stream.op} {size} {stream.gbs:.1f} GB/s")
        for row in matmul.measure(options.tasks, clock):
            products.append(row)
            rate = f"{row.tflops:.3g} TFLOP/s" if row.valid else row.note
            where = f"{row.dtype} {row.m}x{row.n}x{row.k} {row.layout}"
            left = matmul.seconds_left(options.tasks, products, clock)
            wait = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
            progress.say(f"product {len(products)} of {len(options.tasks)}, about {wait} left: {where} {rate}")
    except KeyboardInterrupt:
        return False
    finally:
        progress.clear()
    return True


def _write(options: argparse.Namespace, conditions: dict, rates: dict, found: dict, products: list) -> str:
    name, threads = machine.identity(options.device)
    facts = {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "threads": threads,
        "torch": conditions["torch"],
        "commit": conditions["commit"],
    }
    gpu = options.device.type == "cuda"
    past = not bandwidth.remark(options.arrays, machine.cache_bytes(options.device))
    total = machine.total_bytes(options.device)
    return section.write(options.write, section.Results(facts, rates, past, found, products, gpu, total))


def _unwritten(options: argparse.Namespace) -> str:
    return "" if options.write is None else f"; {options.write} was not written"


def _busy(conditions: dict[str, Any]) -> list[str]:
    load, cores = conditions["load"][0], conditions["cores"] or 1
    if conditions["device"] != "cpu" or load <= cores / 2:
        return []
    return [f"the machine is busy (load {load:g} on {cores} cores): rates will be too low, and not repeat"]


def _title(conditions: dict[str, Any]) -> str:
    gpu = conditions["device"] != "cpu"
    threads = f"{conditions['threads']} thread{'s' * (conditions['threads'] != 1)}"
    where = conditions["device"] if gpu else f"{conditions['processor']}, {threads}"
    return f"{where}, torch {conditions['torch']}"


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What else decides a rate. The environment's part are the switches of the libraries that multiply."""
    prefixes = (
        "PYTORCH_TUNABLEOP_",
        "TORCH_BLAS_",
        "HIPBLASLT_",
        "ROCBLAS_",
        "CUBLAS",
        "MKL_",
        "ONEDNN_",
        "OMP_",
        "KMP_",
    )
    return {
        "command": " ".join(["python -m kernels.bench hardware", *options.words]),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)},
        "rounds": options.rounds,
        "flush": options.device.type == "cuda" and not options.no_flush,
    }


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench hardware",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="memory | matmul", help="what to measure; default both")
    add(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is one (ROCm's devices are called so, too)"
    )
    add("--quick", action="store_true", help="few sizes, the forward layout, bf16 and fp32")
    add("--arrays", metavar="SIZES", help="bytes of one array: 64K:4G[:FACTOR], or 1M,1G; default past the caches")
    add("--sizes", metavar="SIZES", help="M and N of products: 512:16384[:FACTOR], or 512,3072; none for no grid")
    add("--depths", metavar="SIZES", help="K of products: 1024,4096,8192")
    add("--shapes", metavar="MxNxK,...", help="more products, such as those of a model's layers")
    add(
        "--dtypes",
        metavar="NAMES",
        help=f"among {','.join(dtypes.NAMES)}; default: all that a GPU has, bf16,fp32 on a CPU",
    )
    add("--layouts", metavar="NAMES", help=f"among {','.join(matmul.LAYOUTS)}; default all")
    add(
        "--blas",
        metavar="NAMES",
        help=f"libraries to try: on a GPU among {','.join(LIBRARIES['cuda'])}; on a CPU, for fp32, among "
        f"{','.join(LIBRARIES['cpu'])}; default: on GPUs torch's choice, on CPUs that of our runs (cpu.fp32_products)",
    )
    add("--rounds", type=int, help="samples of each figure; default 5 on CPUs, 20 on GPUs")
    add("--no-flush", action="store_true", help="leave a GPU's caches as the last product left them")
    add("--threads", type=int, help="CPU threads; default torch's own choice")
    add("--json", type=Path, metavar="FILE", help="write all samples and the conditions to FILE")
    add("--plot", type=Path, metavar="FILE", help="draw heat maps and curves: .png, .svg or .pdf")
    add("--write", type=Path, metavar="FILE", help="put the ceilings into a hardware file, or make one")
    return parser


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(arguments)
    options.words = list(arguments)
    try:
        if options.device != "cpu" and not torch.cuda.is_available():
            if options.device == "cuda":
                raise ValueError("no CUDA or ROCm device is visible: use --device cpu")
            options.device = "cpu"
        options.device = torch.device(options.device or "cuda")
        _what(options)
        _files(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _what(options: argparse.Namespace) -> None:
    """Everything that is to be measured, from what was said and the device. Raises ValueError for what cannot be."""
    gpu = options.device.type == "cuda"
    options.parts = names("what to measure", options.parts, PARTS) if options.parts else list(PARTS)
    options.rounds = (20 if gpu else 5) if options.rounds is None else options.rounds
    if options.rounds < 2:
        raise ValueError("--rounds must be at least 2")
    if options.threads is not None and options.threads < 1:
        raise ValueError("--threads must be at least 1")
    options.remarks = []
    _memory(options)
    _products(options)


def _memory(options: argparse.Namespace) -> None:
    if "memory" not in options.parts:
        if options.arrays:
            raise ValueError("--arrays belongs to memory, which is not measured here")
        return
    default = bandwidth.default_sizes(options.device, quick=options.quick)
    options.arrays = integers("--arrays", options.arrays, factor=4) if options.arrays else default
    smallest, largest = min(options.arrays), max(options.arrays)
    if smallest < 4096 or largest > 8 << 30 or any(size % bandwidth.ITEM for size in options.arrays):
        raise ValueError("--arrays: an array has 4K to 8G bytes, a multiple of 8")
    free = machine.free_bytes(options.device)
    if 3 * largest > 0.9 * free:
        raise ValueError(
            f"--arrays: three arrays of {largest / 2**30:.3g} GiB do not fit into the {free / 2**30:.3g} GiB that are free"
        )
    remark = bandwidth.remark(options.arrays, machine.cache_bytes(options.device))
    options.remarks += [remark] if remark else []


def _products(options: argparse.Namespace) -> None:
    given = [
        f"--{name}" for name in ("sizes", "depths", "shapes", "dtypes", "layouts", "blas") if getattr(options, name)
    ]
    if "matmul" not in options.parts and given:
        raise ValueError(f"{given[0]} belongs to matmul, which is not measured here")
    gpu = options.device.type == "cuda"
    sizes, depths = (matmul.QUICK if options.quick else matmul.SIZES)[options.device.type]
    options.grid = options.sizes != "none"
    if options.sizes and options.grid:
        sizes = integers("--sizes", options.sizes, factor=2)
    if options.depths:
        depths = integers("--depths", options.depths, factor=2)
    if not options.grid and not options.shapes:
        raise ValueError("--sizes none leaves nothing to multiply: give --shapes")
    options.shapes = matmul.parse(options.shapes) if options.shapes else []
    usual = matmul.LAYOUTS[1:2] if options.quick else matmul.LAYOUTS
    options.layouts = names("--layouts", options.layouts, matmul.LAYOUTS) if options.layouts else list(usual)
    libraries = names("--blas", options.blas, LIBRARIES[options.device.type]) if options.blas else ["default"]
    kinds = _kinds(options, gpu) if "matmul" in options.parts else []
    shapes = [*(matmul.grid(sizes, depths) if options.grid else []), *options.shapes]
    options.tasks = matmul.tasks(kinds, options.layouts, shapes, libraries)
    options.dtypes = [kind.name for kind in kinds]
    if kinds and not options.tasks:
        raise ValueError("nothing to multiply: of the layouts, fp8 has nt only")


def _kinds(options: argparse.Namespace, gpu: bool) -> list[dtypes.Kind]:
    if options.dtypes:
        return [dtypes.kind(name, options.device) for name in names("--dtypes", options.dtypes, dtypes.NAMES)]
    usual = ("bf16", "fp32") if options.quick or not gpu else dtypes.USUAL_GPU
    found = []
    for name in usual:
        try:
            found.append(dtypes.kind(name, options.device))
        except ValueError as error:
            options.remarks.append(f"not measured: {error}".partition(";")[0])
    return found


def _files(options: argparse.Namespace) -> None:
    """Raises ValueError, before anything is measured, for files that could not be written afterwards."""
    for option, path in (("--json", options.json), ("--plot", options.plot)):
        if path is not None and (not path.parent.is_dir() or path.is_dir()):
            raise ValueError(
                f"{option} {path}: " + ("that is a folder" if path.is_dir() else f"there is no folder {path.parent}")
            )
    if options.plot is not None:
        plot.check(options.plot)
    if options.write is not None:
        if set(options.parts) != set(PARTS) or not options.grid:
            raise ValueError("--write needs ceilings: measure memory and matmul, and do not leave the grid out")
        device, _ = machine.identity(options.device)
        section.check(options.write, device, options.device.type == "cuda", options.dtypes)
