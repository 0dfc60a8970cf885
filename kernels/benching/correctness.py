"""Every form of every timed operator against its reference in fp64: outputs, final states and all gradients.

Run it on a GPU before believing a time measured there: the interpreter and the compilers show neither races nor the rounding
of reduced-precision matrix units, and some versions of triton have produced wrong gradients on some chips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.benching.contenders import forced
from kernels.benching.measure import relative_difference
from kernels.benching.workloads import Inputs, Shape, Workload
from kernels.dispatch import explain
from kernels.offline.choice import requested

# Root mean square error over root mean square of the reference. fp32 on a GPU of NVIDIA is tf32 in part: 10 bits of
# mantissa. bf16 has 8, and its gradients pass through two roundings more than outputs.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TOLERANCE_TF32 = 2e-3
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Comparison:
    """One tensor of one form on one case."""

    workload: str
    case: str
    form: str
    tensor: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


@dataclass(frozen=True)
class Case:
    name: str
    shape: Shape
    dtype: torch.dtype
    lengths: tuple[int, ...] = ()  # packed sequences, with an initial and a final state; () for a dense batch


def cases(workload: Workload, device: torch.device) -> Iterator[Case]:
    """Small shapes with every kind of edge: ragged lengths, an empty sequence, states in and out, all head dimensions."""
    sizes = (64, 128, 256) if device.type == "cuda" else (32,)
    recurrent = workload.op in ("gated_linear_attention", "delta_rule")
    for dtype in DTYPES:
        for D in sizes:
            yield Case("dense", Shape(2, 203, 2, D, D), dtype)
            if recurrent:
                yield Case("packed", Shape(1, 260, 2, D, D), dtype, (70, 0, 1, 128, 61))
        if recurrent:
            yield Case("K > V", Shape(1, 130, 3, sizes[-1], sizes[0] // 2), dtype)


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    if dtype == torch.float32 and device.type == "cuda" and not torch.version.hip:
        return TOLERANCE_TF32
    return TOLERANCE[dtype]


def compare(workloads: Sequence[Workload], device: torch.device) -> Iterator[Comparison]:
    """Compares every form that can serve, case by case. A form that fails to run is a comparison that fails."""
    for workload in workloads:
        for case in cases(workload, device):
            yield from _compare(workload, case, device)


def _compare(workload: Workload, case: Case, device: torch.device) -> Iterator[Comparison]:
    inputs = _inputs(workload, case, device)
    forms, request = requested(lambda: _call(workload, inputs))
    wide = {name: _widen(value) for name, value in inputs.items()}
    with forced("reference"):
        wanted = _results(workload, wide)
    label = f"{case.name} {case.shape} {str(case.dtype).removeprefix('torch.')}"
    allowed = tolerance(case.dtype, device)
    for form, verdict in explain(forms, request):
        if form == "reference" or verdict not in ("chosen", "able"):
            continue
        try:
            with forced(form):
                found = _results(workload, inputs)
        except Exception as error:
            note = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            yield Comparison(workload.name, label, form, "-", float("nan"), allowed, note)
            continue
        for name, value in wanted.items():
            yield Comparison(workload.name, label, form, name, relative_difference(found[name], value), allowed)


def _inputs(workload: Workload, case: Case, device: torch.device) -> Inputs:
    inputs = workload.inputs(case.shape, case.dtype, device)
    if case.lengths:
        ends = torch.tensor((0, *case.lengths)).cumsum(0)
        heads = case.shape.H
        state = torch.randn(len(case.lengths), heads, case.shape.K, case.shape.V, device=device) / 4
        inputs["initial_state"] = state.requires_grad_()
        inputs["cu_seqlens"] = ends.to(device=device, dtype=torch.int32)
        inputs["output_final_state"] = True
    return inputs


def _widen(value: Any) -> Any:
    """fp64 copies of what has a fraction; the values are those that the low precision form gets."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def _call(workload: Workload, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """Output and final state. The workload's own call returns the output only, so states go through the operator."""
    if not inputs.get("output_final_state"):
        return workload.call(inputs), None
    function = _operator(workload)
    if workload.name == "mamba2":
        v = (inputs["x"] * inputs["dt"][..., None]).to(inputs["x"].dtype)
        more = {name: inputs[name] for name in ("initial_state", "cu_seqlens", "output_final_state")}
        return function(inputs["C"], inputs["B"], v, inputs["dt"] * inputs["A"], scale=1.0, **more)
    return function(**inputs)


def _operator(workload: Workload) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if workload.op == "delta_rule":
        from kernels.delta_rule import delta_rule

        return delta_rule
    from kernels.gated_linear_attention import gated_linear_attention

    return gated_linear_attention


def _results(workload: Workload, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs and gradients by name. The upstream gradients are the same for every form."""
    o, state = _call(workload, inputs)
    results = {"output": o} | ({} if state is None else {"final state": state})
    torch.manual_seed(1)
    upstream = [torch.randn(value.shape, device="cpu").to(value) for value in results.values()]
    # Mamba-2's A is left out: its gradient is a nearly cancelling sum over all tokens of what dt's gradient shows apart.
    wanted = {
        name: value
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.requires_grad and name != "A"
    }
    gradients = torch.autograd.grad(list(results.values()), list(wanted.values()), upstream)
    return results | {f"gradient of {name}": gradient for name, gradient in zip(wanted, gradients)}
