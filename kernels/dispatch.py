"""Which form of an operator serves a request, and why.

Every operator has one meaning, given by its `reference.py`, and up to three forms: `triton` (fused, GPU), `chunked` (fast plain
torch, the production path on CPU) and `reference` (the loop that defines it). Each form states its own limits in `why_not`;
the first form without an objection serves the request.

`BRAID_KERNELS=reference|chunked|triton` forces one form for debugging. A forced form that cannot serve is an error that says
why; it never falls back in silence.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

NAMES = ("triton", "chunked", "reference")
VARIABLE = "BRAID_KERNELS"
COMPILING = "torch.compile fuses the reference form by itself"


@dataclass(frozen=True)
class Request:
    """What is asked of an operator: everything a form may object to, and nothing else."""

    op: str
    device: torch.device
    dtype: torch.dtype  # of the main operand (q, x)
    shape: Mapping[str, int] = field(default_factory=dict)  # by letter: B T H HV K V D W N ...
    # Flags that matter: gate="none|head|channel", packed=bool, ...
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """One implementation of an operator.

    module, function: imported on first use, so that triton is never imported on a machine without a GPU.
    why_not: returns the reason why this form cannot serve a request, or None.
    """

    name: str
    module: str
    function: str
    why_not: Callable[[Request], str | None] = lambda request: None

    def load(self) -> Callable[..., Any]:
        # torch.compile can follow a look-up, and no import.
        module = sys.modules[self.module] if self.module in sys.modules else importlib.import_module(self.module)
        return getattr(module, self.function)


def triton_objection(request: Request) -> str | None:
    """The objections that every Triton form shares."""
    if (objection := eager_objection(request)) is not None:
        return objection
    if request.device.type != "cuda" and not interpreting():
        return f"the tensors are on {request.device.type}, Triton kernels run on CUDA or ROCm devices"
    if not _installed("triton"):
        return "triton is not installed"
    if request.dtype == torch.float64:
        return "float64 is served by the torch forms only"
    return None


def eager_objection(request: Request) -> str | None:
    """For fast forms of what works on each element or row by itself: torch.compile fuses the reference's operations, and takes
    outputs that are views of one another for what they are not. Other operators it never sees (kernels/common/opaque.py).
    """
    if torch.compiler.is_compiling() and forced_form() is None:
        return COMPILING
    return None


@functools.cache  # looking for a package walks the whole path: 40 microseconds, at every call of every operator
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def interpreting() -> bool:
    """True when TRITON_INTERPRET=1: Triton kernels then run on CPU tensors, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def forced_form() -> str | None:
    name = os.environ.get(VARIABLE, "")
    if not name:
        return None
    if name not in NAMES:
        raise ValueError(f"{VARIABLE}={name!r} is not a form; choose one of {', '.join(NAMES)}, or unset it")
    return name


def explain(forms: Sequence[Form], request: Request) -> list[tuple[str, str]]:
    """(form, verdict) for each form, in order of preference. Verdicts: "chosen", "able", or the objection."""
    forced = forced_form()
    verdicts = []
    chosen = False
    for form in forms:
        objection = form.why_not(request)
        if objection is None and forced is not None and form.name != forced:
            objection = f"{VARIABLE}={forced} forces another form"
        if objection is None and not chosen:
            objection, chosen = "chosen", True
        verdicts.append((form.name, objection or "able"))
    return verdicts


def choose(forms: Sequence[Form], request: Request) -> Form:
    """The form that serves the request.

    Raises ValueError when none does, with each form's reason.
    """
    verdicts = explain(forms, request)
    for form, (_, verdict) in zip(forms, verdicts):
        if verdict == "chosen":
            return form
    reasons = "; ".join(f"{name}: {verdict}" for name, verdict in verdicts)
    raise ValueError(f"no form of {request.op} can serve this request ({reasons})")
