"""What of two runs differs: every tensor bit by bit, what stands beside them in a checkpoint, and every step's metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint import storage
from pretrain.checkpoint.identity import flatten
from pretrain.train import metrics

BATCH_BYTES = 1 << 28  # of each side, read at a time
PLACES = ("config.run",)  # where a run lies is its own affair
MEASURED = ("mfu", "mfu_measured", "memory_bytes")  # and all seconds, and all rates


@dataclass(frozen=True)
class Tensors:
    """How the tensors of two checkpoints compare. faults: the first that differs, in full; then how many others do."""

    count: int
    bytes: int
    faults: list[str]


def tensors(left: Path, right: Path, names: tuple[str, str], same_names: bool = True) -> Tensors:
    """Compares checkpoints bit by bit. names: what to call the two in a fault, such as uninterrupted and resumed."""
    specs, others = storage.contents(left), storage.contents(right)
    faults = [f"{name} is missing in the {names[1]} state" for name in sorted(specs.keys() - others.keys())]
    faults += [f"{name} is missing in the {names[0]} state" for name in sorted(others.keys() - specs.keys())]
    shared = sorted(specs.keys() & others.keys(), key=lambda name: (not name.startswith("rank/"), name))
    for name in shared:
        if specs[name] != others[name]:
            faults.append(f"{name} is {specs[name]} in the {names[0]} state, {others[name]} in the {names[1]}")
    alike = [name for name in shared if specs[name] == others[name]]
    for batch in _batches(alike, specs):
        sides = []
        for folder in (left, right):
            found = {name: torch.empty(specs[name].shape, dtype=specs[name].dtype) for name in batch}
            storage.read(folder, found, subset=True)
            sides.append(found)
        faults += [fault for name in batch if (fault := _difference(name, sides[0][name], sides[1][name], names))]
    return Tensors(len(specs), sum(spec.bytes for spec in specs.values()), shortened(faults, "tensors differ"))


def _batches(names: list[str], specs: Mapping[str, storage.Spec]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for name in names:
        batch.append(name)
        size += specs[name].bytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _difference(name: str, left: Tensor, right: Tensor, names: tuple[str, str]) -> str | None:
    """The first number that differs in its bits: NaN equals the same NaN, and zero differs from minus zero."""
    width = left.dtype.itemsize
    bits = [side.reshape(-1).view(torch.uint8).reshape(-1, width) for side in (left, right)]
    if torch.equal(*bits):
        return None
    where = (bits[0] != bits[1]).any(1).nonzero().flatten()
    first = int(where[0])
    values = [str(side.reshape(-1)[first].item()) for side in (left, right)]
    if values[0] == values[1]:
        values = [f"{value} (0x{bytes(row[first].tolist())[::-1].hex()})" for value, row in zip(values, bits)]
    index = [int(i) for i in torch.unravel_index(torch.tensor(first), left.shape)] if left.dim() else []
    place = f"{name}{index}" if index else name
    amount = f"{len(where)} of {left.numel()} numbers differ" if left.numel() > 1 else "it is the only number"
    return f"{place}: {values[0]} {names[0]}, {values[1]} {names[1]} ({amount})"


def fields(left: Mapping[str, Any], right: Mapping[str, Any], names: tuple[str, str]) -> list[str]:
    """What differs in nested values that JSON can hold, field by field; numbers bit by bit."""
    one, other = flatten(left), flatten(right)
    faults = []
    for key in sorted({*one, *other} - {*PLACES}):
        # As text: NaN equals NaN, and 1 differs from 1.0.
        texts = [json.dumps(side[key]) if key in side else "absent" for side in (one, other)]
        if texts[0] != texts[1]:
            faults.append(f"{key}: {texts[0]} {names[0]}, {texts[1]} {names[1]}")
    return faults


def series(left: Path, right: Path, names: tuple[str, str]) -> tuple[int, list[str]]:
    """Compares the records of two files step by step, but for what is measured with a clock. Returns (records, faults)."""
    if not left.exists() and not right.exists():
        return 0, []
    sides = [metrics.read(path) if path.exists() else [] for path in (left, right)]
    steps = [[record["step"] for record in side] for side in sides]
    if steps[0] != steps[1]:
        return len(steps[0]), [f"{left.name}: steps {steps[0]} {names[0]}, {steps[1]} {names[1]}"]
    faults = []
    for one, other in zip(*sides):
        known = [{key: value for key, value in record.items() if not _is_measured(key)} for record in (one, other)]
        faults += [f"{left.name}, step {one['step']}: {fault}" for fault in fields(known[0], known[1], names)]
    return len(sides[0]), shortened(faults, "values differ")


def _is_measured(key: str) -> bool:
    return key in MEASURED or key.endswith(("seconds", "per_second"))


def shortened(faults: list[str], what: str) -> list[str]:
    return faults if len(faults) <= 3 else [*faults[:3], f"and {len(faults) - 3} more {what}"]
