"""Deciding from outside which form of an operator serves a call.

Compiling offline needs the Triton forms to take CPU tensors; explaining needs the request that a call makes, without
making it. In both cases the public function is called, so that forms get exactly what they get in use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kernels import dispatch
from kernels.dispatch import Form, Request


class Declined(Exception):
    """The Triton form has an objection to a request."""


@contextlib.contextmanager
def choosing(choice: Callable[[Sequence[Form], Request], Form]) -> Iterator[None]:
    """Within this context operators choose their form by `choice`, in place of `kernels.dispatch.choose`."""
    changed = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("kernels.") and name != "kernels.dispatch" and vars(module).get("choose") is dispatch.choose
    ]
    for module in changed:
        module.choose = choice  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in changed:
            module.choose = dispatch.choose  # type: ignore[attr-defined]


@contextlib.contextmanager
def triton_chosen() -> Iterator[None]:
    """Within this context every operator takes its Triton form, if that form would serve the request on a GPU.

    The forms raise Declined where it would not.
    """

    def choice(forms: Sequence[Form], request: Request) -> Form:
        on_gpu = dataclasses.replace(request, device=torch.device("cuda"))
        for form in forms:
            if form.name == "triton":
                objection = form.why_not(on_gpu)
                if objection is not None:
                    raise Declined(objection)
                return form
        raise Declined("no Triton form")

    with choosing(choice):
        yield


def requested(call: Callable[[], Any]) -> tuple[Sequence[Form], Request]:
    """The forms and the request of the first operator that `call` calls, which is not carried out."""

    class Asked(Exception):
        pass

    asked: list[tuple[Sequence[Form], Request]] = []

    def choice(forms: Sequence[Form], request: Request) -> Form:
        asked.append((forms, request))
        raise Asked

    with choosing(choice), contextlib.suppress(Asked):
        call()
    if not asked:
        raise ValueError("the call asked for no operator")
    return asked[0]
