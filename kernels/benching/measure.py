"""One workload at one shape: all contenders against each other, forward, and forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.benching import memory, timing
from kernels.benching.contenders import Call, Contender, ours, peers
from kernels.benching.timing import Timing
from kernels.benching.workloads import Inputs, Shape, Workload, leaves

FORWARD, BOTH = "forward", "forward+backward"


@dataclass
class Measurement:
    """One contender, workload, shape and mode."""

    workload: str
    shape: str
    dtype: str
    mode: str
    contender: str
    timing: Timing | None = None
    ratio: float | None = None  # to the first of our own forms that was timed; above 1 is slower
    peak_bytes: int | None = None
    difference: float | None = None  # root mean square difference of outputs from that form, relative
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        values = {name: value for name, value in vars(self).items() if name != "timing"}
        if self.timing is not None:
            values["median_seconds"] = self.timing.median
            values["spread"] = self.timing.spread
            values["samples"] = list(self.timing.samples)
        return values


def relative_difference(x: Tensor, wanted: Tensor) -> float:
    """Root mean square of x - wanted over that of `wanted`, in fp64."""
    a, b = x.detach().double(), wanted.detach().double()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-30))


def runner(call: Call, inputs: Inputs, mode: str) -> Callable[[], object]:
    """A call of no arguments in the given mode. Gradients are returned, not accumulated."""
    if mode == FORWARD:

        def forward() -> object:
            with torch.no_grad():
                return call(inputs)

        return forward
    wanted = leaves(inputs)
    upstream: list[Tensor] = []

    def both() -> object:
        o = call(inputs)
        if not upstream:
            upstream.append(torch.randn_like(o))
        return torch.autograd.grad(o, wanted, upstream[0].to(o.dtype), allow_unused=True)

    return both


def measure(
    workload: Workload,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    modes: Sequence[str],
    *,
    families: tuple[str, ...] | None,
    reference: bool,
    rounds: int,
    budget: float,
) -> list[Measurement]:
    """Everyone who can take part, interleaved; those who cannot, with the reason.

    families: peers asked for by name (`kernels.benching.contenders.FAMILIES`), None for the usual ones, () for none.
    """
    contenders = ours(workload, shape, dtype, device, reference=reference)
    contenders += [] if families == () else peers(workload, shape, device, families)
    inputs = workload.inputs(shape, dtype, device)
    found: list[Measurement] = []
    for mode in modes:
        rows = {c.name: Measurement(workload.name, str(shape), _short(dtype), mode, c.name) for c in contenders}
        running = _able(contenders, inputs, mode, rows)
        timings = timing.interleaved(
            running, device, rounds=rounds, budget=budget, warmups=3 if device.type == "cuda" else 1
        )
        first = next((name for name in running if name.startswith("braid")), None)
        for name, took in timings.items():
            rows[name].timing = took
            rows[name].peak_bytes = memory.peak_bytes(running[name], device)
            rows[name].ratio = took.ratio(timings[first]) if first is not None else None
        found += rows.values()
    return found


def _able(
    contenders: Sequence[Contender], inputs: Inputs, mode: str, rows: dict[str, Measurement]
) -> dict[str, Callable[[], object]]:
    """The contenders that run, each tried once; outputs are compared, so that nobody wins by computing something else."""
    running: dict[str, Callable[[], object]] = {}
    wanted: Tensor | None = None
    for contender in contenders:
        row = rows[contender.name]
        if contender.objection is not None or contender.call is None:
            row.note = contender.objection or "not usable"
            continue
        try:
            with torch.no_grad():
                o = contender.call(inputs)
            run = runner(contender.call, inputs, mode)
            if mode != FORWARD:
                run()
        except Exception as error:
            row.note = f"failed: {type(error).__name__}: {error}".splitlines()[0][:160]
            if contender.name.startswith("braid"):
                row.note = f"FAILED: {type(error).__name__}: {error}"  # ours must not: bench ends with an error
            continue
        running[contender.name] = run
        if not contender.same:
            row.note = "another operator, as a yardstick"
            continue
        wanted = o if wanted is None else wanted
        row.difference = relative_difference(o, wanted)
    return running


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))
