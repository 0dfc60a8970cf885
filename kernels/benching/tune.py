"""Searches launch parameters on the device at hand, and writes them into kernels/tuning/<architecture>.json.

A kernel's author lists what is worth trying in CANDIDATES next to DEFAULTS. Kernels are tuned one after the other, each by
the time of the whole operator with everything else at its present value: a kernel that is fast by itself may still make the
next one slow. A candidate that does not compile, does not fit or changes the results is out. Written rows are read at run
time and compiled by `kernels.check`, so a wrong row does not go unnoticed.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels import tuning
from kernels.benching import timing
from kernels.benching.measure import BOTH, relative_difference, runner
from kernels.benching.workloads import Shape, Workload

GAIN = 0.02  # a candidate must be this much faster: less is noise, and a table full of noise is no table
SAME = 1e-2  # relative difference of results between launch parameters; block sizes change the order of sums
BUCKETED = ("T", "heads", "B", "N", "rows", "tokens")  # sizes that rows bound by powers of two, not by equality

Candidates = Mapping[str, Sequence[Mapping[str, int]]]


@dataclass(frozen=True)
class Choice:
    """What came out for one kernel under the keys of its lookup."""

    kernel: str
    keys: Mapping[str, Any]
    before: Mapping[str, int]
    best: Mapping[str, int]
    seconds_before: float
    seconds_best: float
    tried: int
    failed: int

    @property
    def gained(self) -> bool:
        return self.best != self.before


def candidates(op: str) -> dict[str, Sequence[Mapping[str, int]]]:
    """The CANDIDATES tables of an operator's modules, by kernel name."""
    package = importlib.import_module(f"kernels.{op}")
    found: dict[str, Sequence[Mapping[str, int]]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        if info.name.startswith("triton"):
            found.update(getattr(importlib.import_module(f"kernels.{op}.{info.name}"), "CANDIDATES", {}))
    return found


def tune(
    workload: Workload,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    table: Candidates | None = None,
    rounds: int = 10,
    say: Callable[[str], None] = lambda line: None,
) -> list[Choice]:
    """The best launch parameters of every kernel that the workload launches at this shape. Writes nothing.

    table: candidates by kernel; those of the operator's modules by default.
    """
    table = candidates(workload.op) if table is None else table
    run = runner(workload.call, workload.inputs(shape, dtype, device), BOTH)
    with tuning.observe() as lookups:
        wanted = _tensors(run())
    asked = {kernel: (keys, use) for kernel, keys, use in lookups if kernel in table}
    settled: dict[str, Mapping[str, int]] = {}
    choices = []
    for kernel, (keys, before) in asked.items():
        with tuning.override(settled):
            choice = _tune_kernel(kernel, keys, before, table[kernel], run, wanted, device, rounds)
        if choice.gained:
            settled[kernel] = choice.best
        say(
            f"{workload.name} {shape} {kernel}: {choice.tried} tried, {choice.failed} failed, "
            f"{choice.seconds_before * 1000:.3f} ms -> {choice.seconds_best * 1000:.3f} ms {dict(choice.best)}"
        )
        choices.append(choice)
    return choices


def _tune_kernel(
    kernel: str,
    keys: Mapping[str, Any],
    before: Mapping[str, int],
    options: Sequence[Mapping[str, int]],
    run: Callable[[], object],
    wanted: list[torch.Tensor],
    device: torch.device,
    rounds: int,
) -> Choice:
    calls: dict[str, Callable[[], object]] = {"before": run}
    by_name: dict[str, Mapping[str, int]] = {}
    failed = 0
    for option in options:
        name = str(dict(option))

        def call(option: Mapping[str, int] = option) -> object:
            with tuning.override({kernel: option}):
                return run()

        if _works(call, wanted):
            calls[name], by_name[name] = call, option
        else:
            failed += 1
    # Half of the candidates are far off: a short round first, then the better ones against each other.
    quick = timing.interleaved(calls, device, rounds=3, budget=1e9)
    ranked = sorted(by_name, key=lambda name: quick[name].median)[:5]
    final = timing.interleaved(
        {name: calls[name] for name in ("before", *ranked)}, device, rounds=rounds, budget=1e9, warmups=1
    )
    best, option = "before", before
    for name in ranked:
        if final[name].ratio(final["before"]) < 1 - GAIN and final[name].median < final[best].median:
            best, option = name, by_name[name]
    return Choice(kernel, keys, before, option, final["before"].median, final[best].median, len(options), failed)


def _works(call: Callable[[], object], wanted: list[torch.Tensor]) -> bool:
    """Whether a candidate compiles, fits on the device and gives the results of the present parameters."""
    try:
        found = _tensors(call())
    except Exception:  # triton raises a different error for each way of not fitting; all mean that it is out
        return False
    return all(relative_difference(x, y) <= SAME for x, y in zip(found, wanted))


def _tensors(gradients: object) -> list[torch.Tensor]:
    assert isinstance(gradients, tuple), "the runner returns the gradients"
    return [x.detach().clone() for x in gradients if x is not None]


def condition(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The `when` of a row for these keys: sizes that vary from call to call in buckets by powers of two, the rest exact."""
    when: dict[str, Any] = {}
    for name, value in keys.items():
        if name in BUCKETED and isinstance(value, int) and value > 0:
            low = 1 << (value.bit_length() - 1)
            when[f"{name}_min"], when[f"{name}_max"] = low, 2 * low - 1
        else:
            when[name] = value
    return when


def write(arch: str, choices: Sequence[Choice], measured: str, folder: Path = tuning.FOLDER) -> int:
    """Puts a row into the architecture's file for every choice that gained; returns how many.

    A row with the same condition is replaced. measured: where, when and by which command; the times are added to it.
    """
    path = folder / f"{arch}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    written = 0
    for choice in choices:
        if not choice.gained:
            continue
        when = condition(choice.keys)
        entry = content.setdefault(choice.kernel, {})
        rows = [row for row in entry.get("rows", []) if row["when"] != when]
        times = f"{choice.seconds_best * 1000:.3f} ms, {choice.seconds_before * 1000:.3f} ms before"
        rows.append({"when": when, "use": dict(choice.best), "measured": f"{times}; {measured}"})
        entry["rows"] = rows
        written += 1
    if written:
        path.write_text(_format(content))
        tuning.forget()
    return written


def _format(content: Mapping[str, Any]) -> str:
    """JSON with one row a line, so that a change of one row is a change of one line."""
    kernels = []
    for kernel in sorted(content):
        parts = []
        if "default" in content[kernel]:
            parts.append(f'    "default": {json.dumps(content[kernel]["default"])}')
        if content[kernel].get("rows"):
            rows = ",\n".join(f"      {json.dumps(row)}" for row in content[kernel]["rows"])
            parts.append(f'    "rows": [\n{rows}\n    ]')
        body = ",\n".join(parts)
        kernels.append(f"  {json.dumps(kernel)}: {{\n{body}\n  }}" if parts else f"  {json.dumps(kernel)}: {{}}")
    return "{\n" + ",\n".join(kernels) + "\n}\n" if kernels else "{}\n"
