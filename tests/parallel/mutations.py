"""Deliberate faults in layouts, all of which the equivalence gate must notice: `python -m tests.parallel.mutations` shows how.

A mutation is a context manager that is entered on every rank of a layout, while a model of MODELS is trained there: it replaces
one function of the product. They are in the files mutations_*.py, by the axis that they break.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

HYBRID: dict[str, Any] = {
    "vocabulary": 64, "width": 32, "init_std": 0.15,
    "mixers": {
        "attention": {"kind": "attention", "heads": 4, "kv_heads": 1, "qk_norm_over": "width", "out_bias": True},
        "gdn": {"kind": "gated_delta_net", "heads": 2, "value_heads": 4, "head_dim": 8},
        "gla": {"kind": "gla", "heads": 2, "gate_rank": 8},
    },
    "ffns": {
        "moe": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 16, "batch_loss": 0.05, "sequence_loss": 0.05},
        "zaya": {"kind": "zaya_moe", "experts": 4, "hidden": 16, "router_width": 8},
    },
    "layers": ["attention + moe", "gdn + zaya", "gla + zaya"],
}  # fmt: skip
COMPRESSED: dict[str, Any] = {
    "vocabulary": 64, "width": 32, "init_std": 0.15,
    "mixers": {"cca": {"kind": "cca", "heads": 4, "kv_heads": 2, "head_dim": 8}},
    "ffns": {"swiglu": {"kind": "swiglu", "hidden": 32}},
    "layers": ["cca + swiglu x2"],
}  # fmt: skip
MODELS = {"hybrid": HYBRID, "compressed": COMPRESSED}

Patch = Callable[[int], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Mutation:
    """what: is wrong. layout: in which it shows (` of 4`: on so many ranks, else on 2). patch: rank -> the fault in place.
    model: of MODELS."""

    name: str
    what: str
    layout: str
    patch: Patch
    model: str = "hybrid"

    @property
    def world(self) -> int:
        return 4 if self.layout.endswith("of 4") else 2


MUTATIONS: list[Mutation] = []


def mutation(layout: str, what: str, model: str = "hybrid") -> Callable[[Patch], Patch]:
    """Registers a function as the patch of a mutation, which bears its name."""

    def register(patch: Patch) -> Patch:
        MUTATIONS.append(Mutation(getattr(patch, "__name__", "?").replace("_", " "), what, layout, patch, model))
        return patch

    return register


def replaced(target: str, new: Any) -> AbstractContextManager[Any]:
    """Puts `new` in place of what is named by its module (and class) and name."""
    return mock.patch(target, new)


@contextmanager
def wrapped(target: str, wrap: Callable[[Callable[..., Any]], Any]) -> Iterator[None]:
    """As replaced, by wrap(what was there)."""
    with mock.patch(target, wrap(pkgutil.resolve_name(target))):
        yield


@contextmanager
def doctored(module: str, **changes: Callable[..., Any]) -> Iterator[None]:
    """A module's `dist` with some functions replaced, for that module alone."""
    import torch.distributed as dist

    class Doctored:
        def __getattr__(self, name: str) -> Any:
            return changes.get(name, getattr(dist, name))

    with mock.patch(f"{module}.dist", Doctored()):
        yield


if __name__ == "__main__":
    from tests.parallel.mutation_ranks import main

    sys.exit(main())
