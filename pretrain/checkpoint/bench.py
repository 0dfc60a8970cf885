"""How fast checkpoints are, against the disk itself and against torch.distributed.checkpoint: pairs taken turn by turn.

Times of a shared machine say little; ratios of neighbours in time say more. So every round does everything once, the first
place in it goes round, and what is printed is the median over rounds of times and of ratios within a round.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from pretrain.checkpoint.background import BackgroundSaver
from pretrain.checkpoint.durable import fsync_folder
from pretrain.checkpoint.lifecycle import Checkpoints
from pretrain.checkpoint.planned import as_bytes

TENSOR_BYTES = 16 << 20
SMALL = 200  # tensors of 64 numbers, as norms and biases are
WINDOW = 10  # steps

Times = dict[str, list[float]]


def state_of(size: int) -> dict[str, Tensor]:
    """Random numbers: about `size` bytes in matrices of 16 MiB and in 200 small tensors."""
    generator = torch.Generator().manual_seed(0)
    count, rest = divmod(size, TENSOR_BYTES)
    sizes = [TENSOR_BYTES] * count + ([rest] if rest >= 4 else [])
    made = {f"model/{i}": torch.randn(bytes_ // 4, generator=generator) for i, bytes_ in enumerate(sizes)}
    return made | {f"optimizer/{i}/scale": torch.randn(64, generator=generator) for i in range(SMALL)}


def saves_and_loads(size: int, folder: Path, rounds: int, say: Callable[[str], None]) -> tuple[Times, Times]:
    """(seconds, seconds of processor time) of each round, by name.

    Loads read from the disk: what the system had kept of the files is dropped before.
    """
    state = state_of(size)
    target = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    times: Times = {}
    work: Times = {}
    scratch = Path(tempfile.mkdtemp(prefix="checkpoint-bench-", dir=folder))
    checkpoints = Checkpoints(scratch / "ours", keep=1)
    jobs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "plain": (lambda: _plain_write(scratch / "plain", state), lambda: _plain_read(scratch / "plain", target)),
        "ours": (lambda: checkpoints.save(1, state, {}), lambda: checkpoints.resume(target)),
        "dcp": (lambda: _dcp_save(scratch / "dcp", state), lambda: _dcp_load(scratch / "dcp", target)),
    }
    try:
        for number in range(rounds + 1):  # the first one warms up and does not count
            turn = [*jobs][number % 3 :] + [*jobs][: number % 3]
            for what in ("save", "load"):
                for name in turn:
                    _prepare(scratch / name, what)
                    if what == "load":
                        for tensor in target.values():
                            tensor.zero_()
                    start, busy = time.perf_counter(), time.process_time()
                    jobs[name][what == "load"]()
                    seconds, busy = time.perf_counter() - start, time.process_time() - busy
                    if number:
                        times.setdefault(f"{what} {name}", []).append(seconds)
                        work.setdefault(f"{what} {name}", []).append(busy)
                    if what == "load":
                        assert all(torch.equal(state[key], target[key]) for key in state), f"{name} lost something"
            if number:
                said = ", ".join(f"{name} {values[-1]:.2f}" for name, values in times.items())
                say(f"round {number}: {said} s; load {os.getloadavg()[0]:.1f}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return times, work


def _prepare(path: Path, what: str) -> None:
    """An empty place to save to, or files to load of which memory holds nothing; and a quiet disk."""
    gc.collect()
    if what == "save":
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        os.sync()
        return
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _plain_write(path: Path, state: dict[str, Tensor]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for tensor in state.values():
        view = as_bytes(tensor)
        while view:
            view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
    os.close(descriptor)
    fsync_folder(path.parent)


def _plain_read(path: Path, target: dict[str, Tensor]) -> None:
    with path.open("rb", buffering=0) as file:
        for tensor in target.values():
            view = as_bytes(tensor)
            while view:
                view = view[file.readinto(view) or sys.maxsize :]


def _dcp_save(path: Path, state: dict[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(state), checkpoint_id=path, no_dist=True)


def _dcp_load(path: Path, target: dict[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(dict(target), checkpoint_id=path, no_dist=True)


def ratios(times: Times) -> dict[str, float]:
    """Rates against each other, medians over rounds: ours / plain means the share of the disk's rate that we reach."""
    found = {}
    for what in ("save", "load"):
        for other in ("plain", "dcp"):
            pairs = zip(times[f"{what} {other}"], times[f"{what} ours"], strict=True)
            found[f"{what} ours/{other}"] = statistics.median(theirs / ours for theirs, ours in pairs)
    return found


def stall(
    size: int, folder: Path, rounds: int, step_seconds: float, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """What a save beside training costs the ten steps around it.

    A step is matrix products on one thread, as the host of an accelerator has cores to spare. Whole windows of a shared machine
    differ by more than a save costs, so steps are compared with their neighbours: what the start of the save and the steps
    until it was committed took beyond the median of the other steps of the same window, as a share of ten such steps.
    Returns lists over rounds: seconds for which the start held the training thread; seconds from there until the commit;
    seconds of an undisturbed step; by what share the mean of the ten steps grew; the same of windows without a save, where
    the steps at the same places are compared, so that a machine that tells nothing shows itself.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    state = state_of(size)
    matrix = torch.randn(512, 512) / 23.0
    products = _products(matrix, step_seconds)
    scratch = Path(tempfile.mkdtemp(prefix="checkpoint-bench-", dir=folder))
    done: list[float] = []
    saver = BackgroundSaver(Checkpoints(scratch, keep=1), lambda step, path, seconds: done.append(time.perf_counter()))
    found: dict[str, list[float]] = {"held": [], "saved": [], "step": [], "more": [], "control": []}
    try:
        for number in range(rounds + 1):  # in the first one the memory for the copy is taken
            begun = time.perf_counter()
            saver.start(number, state, {}, {})
            held = time.perf_counter() - begun
            ends = _window(matrix, products)
            saver.wait()
            first = sum(end < done[-1] for end in ends) + 1  # steps until the commit, and the one in which it fell
            if first > WINDOW // 2:
                raise ValueError(
                    f"the save outlasted {first - 1} of {WINDOW} steps; longer steps (--step-seconds) or a smaller --size"
                )
            step, more = _beyond([begun + held, *ends], first, held)
            start = time.perf_counter()
            _, control = _beyond([start, *_window(matrix, products)], first, 0.0)
            if number:
                for name, value in zip(found, (held, done[-1] - begun, step, more, control), strict=True):
                    found[name].append(value)
                say(
                    f"round {number}: held {1000 * held:.0f} ms, committed after {done[-1] - begun:.2f} s, steps "
                    f"{1000 * step:.1f} ms, {100 * more:+.1f}% around the save, {100 * control:+.1f}% where there is none; "
                    f"load {os.getloadavg()[0]:.1f}"
                )
    finally:
        saver.wait()
        shutil.rmtree(scratch, ignore_errors=True)
        torch.set_num_threads(threads)
    return found


def _window(matrix: Tensor, products: int) -> list[float]:
    """The moments at which ten steps ended."""
    ends = []
    for _ in range(WINDOW):
        _step(matrix, products)
        ends.append(time.perf_counter())
    return ends


def _beyond(moments: list[float], first: int, held: float) -> tuple[float, float]:
    """(seconds of an undisturbed step, share by which `held` and the `first` steps raise the mean of all)."""
    seconds = [end - start for start, end in pairwise(moments)]
    usual = statistics.median(seconds[first:])
    return usual, (held + sum(seconds[:first]) - first * usual) / (len(seconds) * usual)


def _step(matrix: Tensor, products: int) -> None:
    x = matrix
    for _ in range(products):
        x = x @ matrix


def _products(matrix: Tensor, seconds: float) -> int:
    """How many products take about so long."""
    _step(matrix, 20)
    start = time.perf_counter()
    _step(matrix, 50)
    return max(1, round(50 * seconds / (time.perf_counter() - start)))


def bench(size: int, folder: Path, rounds: int, steps: bool, step_seconds: float, out: Path | None) -> int:
    """Measures, prints a table, and writes all numbers to `out` (JSON) if given. Returns 0."""
    from rich.console import Console
    from rich.table import Table

    folder.mkdir(parents=True, exist_ok=True)
    console = Console() if sys.stdout.isatty() else Console(width=120)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    before = os.getloadavg()[0]
    record: dict[str, Any] = {"bytes": size, "rounds": rounds, "torch": torch.__version__, "cores": os.cpu_count()}
    if steps:
        found = stall(size, folder, rounds, step_seconds, say)
        usual = {name: statistics.median(values) for name, values in found.items()}
        low, _, high = statistics.quantiles(found["more"], n=4) if rounds > 1 else 3 * found["more"]
        console.print(
            f"A save of {size / 2**20:.0f} MiB beside training, medians of {rounds}: held {1000 * usual['held']:.0f} ms, "
            f"committed after {usual['saved']:.2f} s; the mean of the ten steps around it, of {1000 * usual['step']:.0f} ms, "
            f"grows by {100 * usual['more']:+.2f}% (quartiles {100 * low:+.2f}, {100 * high:+.2f}; without a save "
            f"{100 * usual['control']:+.2f}%).",
            highlight=False,
        )
        record |= {"stall": found, "slower": usual["more"]}
    else:
        times, work = saves_and_loads(size, folder, rounds, say)
        table = Table("", "seconds", "GB/s", "processor seconds", box=None, pad_edge=False)
        for name, values in times.items():
            middle = statistics.median(values)
            busy = statistics.median(work[name])
            table.add_row(name, f"{middle:.3f}", f"{size / middle / 1e9:.2f}", f"{busy:.3f}")
        console.print(table)
        found_ratios = ratios(times)
        console.print("; ".join(f"{name} {value:.2f}" for name, value in found_ratios.items()), highlight=False)
        record |= {"seconds": times, "processor_seconds": work, "ratios": found_ratios}
    record["load"] = [before, os.getloadavg()[0]]
    console.print(f"load {before:.1f} before, {record['load'][1]:.1f} after, {os.cpu_count()} cores", highlight=False)
    if out is not None:
        out.write_text(json.dumps(record, indent=1) + "\n")
    return 0
