"""Reads what the benchmark wrote (`python -m parallel.bench --json F`): rows to fit, and the shape of each group."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parallel.fabric.fit import Fit, Row
from parallel.fabric.topology import OPS

COPIED = ("all_reduce", "broadcast", "reduce")  # out of place, torch does a copy first, which is no communication


def read(path: Path) -> dict[str, Any]:
    """The file's content. Raises ValueError where it is missing or not of the benchmark."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(document, dict) or document.get("convention") != "nccl-tests" or "rows" not in document:
        raise ValueError(
            f"{path}: not a result of the collective benchmark; write one with torchrun ... -m parallel.bench --json FILE"
        )
    return document


def rows(document: dict[str, Any]) -> list[Row]:
    """The rows that say something about the fabric: of each op and group one dtype and one place, as an engine would call it."""
    kept: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in document["rows"]:
        if (
            row["op"] in OPS
            and row["ranks"] > 1
            and row["bytes"] > 0
            and row["microseconds"] > 0
            and not row.get("wrong")
        ):
            kept.setdefault((row["op"], row["group"]), []).append(row)
    found = []
    for (op, _), several in kept.items():
        best = [row for row in several if row["dtype"] == several[0]["dtype"]]
        places = {row["in_place"] for row in best}
        if len(places) == 2:
            best = [row for row in best if row["in_place"] == (op in COPIED)]
        # The median, as the benchmark's own fits: a mean holds what else the machine did meanwhile.
        times = [1e-6 * row.get("p50", row["microseconds"]) for row in best]
        found += [Row(row["op"], row["group"], row["ranks"], row["bytes"], time) for row, time in zip(best, times)]
    return found


def measured(document: dict[str, Any], fits: Sequence[Fit]) -> list[dict[str, Any]]:
    """Entries for `fabric.measured` of a hardware file: one for each op and shape of group whose bandwidth was seen."""
    node = int(document["machine"]["ranks_per_node"])
    strides = {group["name"]: int(group["stride"]) for group in document["groups"]}
    found: dict[tuple[str, int, int], dict[str, Any]] = {}
    for fit in fits:
        stride = strides.get(fit.group)
        if stride is None or fit.busbw_gbs is None:
            continue
        near = 1 if stride >= node else min(fit.ranks, node // stride)
        found.setdefault(
            (fit.op, fit.ranks, near),
            {
                "op": fit.op,
                "ranks": fit.ranks,
                "ranks_in_node": near,
                "alpha_us": float(f"{fit.alpha_us:.4g}"),
                "busbw_gbs": float(f"{fit.busbw_gbs:.4g}"),
            },
        )
    return list(found.values())
