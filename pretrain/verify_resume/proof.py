"""Three runs of one configuration: uninterrupted; killed by SIGKILL after a checkpoint; resumed from it to the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from pretrain import config as configuration
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.folder import META, checkpoint_name, entries
from pretrain.checkpoint.sealed import read_sealed
from pretrain.config import RunConfig
from pretrain.exit import ERROR, USAGE
from pretrain.train.save import FOLDER
from pretrain.verify_resume import compare, ranks
from pretrain.verify_resume.worker import Task

Start = Callable[[Task, int], list[int]]
RUNS = ("uninterrupted", "resumed")
RECORDS = ("metrics.jsonl", "validation.jsonl")


class RunFailed(Exception):
    """One of the three runs did not end as it should. exit_code: for the command."""

    def __init__(self, message: str, exit_code: int = ERROR):
        super().__init__(message)
        self.exit_code = exit_code


def prove(
    config: RunConfig,
    world: int,
    at: int,
    scratch: Path,
    say: Callable[[str], None],
    start: Start = ranks.start,
) -> list[str]:
    """What differs between the uninterrupted and the resumed run, one line each; [] if nothing does.

    config: its train.steps is the length of the runs; its folder and its checkpoint intervals are not used. at: the step to
    resume from; 2 <= at <= steps - 2. scratch: an empty folder for three runs. start: runs a task on so many ranks. Raises
    RunFailed.
    """
    whole, broken, arrival = scratch / "uninterrupted", scratch / "resumed", scratch / "arrival"
    tasks = {
        "uninterrupted": Task(_prepare(config, whole, at, scratch / "uninterrupted.yaml")),
        "interrupted": Task(_prepare(config, broken, at, scratch / "interrupted.yaml"), kill_after=at),
        "resumed": Task(_prepare(config, broken, at, scratch / "resumed.yaml"), arrival=arrival),
    }
    for name, task in tasks.items():
        begin = time.perf_counter()
        _run(name, task, world, start)
        seconds = time.perf_counter() - begin
        how = f"killed in step {at + 2}" if task.kill_after else f"{config.train.steps} steps"
        say(f"{name}: {how} on {world} rank(s), {seconds:.1f} s")
    try:
        return _judge(whole, broken, arrival, at, config.train.steps, say)
    except (CheckpointError, OSError, ValueError) as error:
        raise RunFailed(f"a checkpoint that must be there cannot be read: {error}") from error


def _prepare(config: RunConfig, run: Path, at: int, file: Path) -> Path:
    """The run file of one run. The two runs differ in their folder only."""
    checkpoint = config.checkpoint.model_copy(update={"every": at, "keep": config.train.steps})
    log = config.log.model_copy(update={"tensorboard": False})
    file.write_text(configuration.dump(config.model_copy(update={"run": run, "checkpoint": checkpoint, "log": log})))
    return file


def _run(name: str, task: Task, world: int, start: Start) -> None:
    codes = start(task, world)
    wanted = -9 if task.kill_after else 0
    wrong = [rank for rank, code in enumerate(codes) if code != wanted]
    if wrong:
        # The first to fail usually says why; those that were ended in its wake (by a signal) say nothing.
        rank = next((rank for rank in wrong if codes[rank] > 0), wrong[0])
        lines = "\n".join(f"  {line}" for line in ranks.last_lines(task, rank))
        text = f"the {name} run: rank {rank} ended with exit code {codes[rank]} instead of {wanted}\n{lines}"
        raise RunFailed(text, USAGE if codes[rank] == USAGE else ERROR)


def _judge(whole: Path, broken: Path, arrival: Path, at: int, steps: int, say: Callable[[str], None]) -> list[str]:
    reached = entries(arrival)[0]
    if reached.step != at:
        return [f"the run was resumed after step {reached.step} instead of step {at}"]
    saved, again = (run / FOLDER / checkpoint_name(at) for run in (whole, broken))
    found = compare.tensors(saved, again, ("uninterrupted", "interrupted"))
    say(f"step {at} of both runs: {_summary(found)}")
    if found.faults:
        return [f"the runs differ before the interruption, so training itself is not reproducible: {found.faults[0]}"]

    faults = []
    found = compare.tensors(again, reached.path, ("in the checkpoint", "after resuming"))
    say(f"state after resuming, against the checkpoint: {_summary(found)}")
    faults += [f"not restored: {fault}" for fault in found.faults]
    meta = read_sealed(again / META)["meta"]
    taken = reached.record["meta"]
    known = {key: meta[key] for key in taken}
    faults += [
        f"not restored: {fault}" for fault in compare.fields(known, taken, ("in the checkpoint", "after resuming"))
    ]

    last = [run / FOLDER / checkpoint_name(steps) for run in (whole, broken)]
    metas = [read_sealed(folder / META)["meta"] for folder in last]
    different = compare.fields(metas[0], metas[1], RUNS)
    say(f"step {steps}, what stands beside the tensors ({', '.join(metas[0])}): {_verdict(different)}")
    faults += [f"step {steps}, {META}: {fault}" for fault in compare.shortened(different, "fields differ")]
    for name in RECORDS:
        count, different = compare.series(whole / name, broken / name, RUNS)
        if count or different:
            say(f"{name}, {count} records: {_verdict(different)}")
        faults += different
    found = compare.tensors(last[0], last[1], RUNS)
    say(f"step {steps} of both runs: {_summary(found)}")
    return faults + [f"step {steps}: {fault}" for fault in found.faults]


def _summary(found: compare.Tensors) -> str:
    return f"{found.count} tensors, {found.bytes / 2**20:.1f} MiB: {_verdict(found.faults)}"


def _verdict(faults: list[str]) -> str:
    return "DIFFERENT" if faults else "equal bit for bit"
