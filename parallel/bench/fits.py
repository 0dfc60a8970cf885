"""From rows to the alpha-beta model of parallel/fabric and its advice on bucket sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from parallel.bench.operations import OPERATIONS
from parallel.bench.rows import Row
from parallel.bench.sizes import show
from parallel.fabric.fit import Advice, Fit, advice, fit
from parallel.fabric.fit import Row as Point


class Curve(NamedTuple):
    """One fit and the rows it is of: a dtype and a place."""

    fit: Fit
    dtype: str
    in_place: bool

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self.fit), "dtype": self.dtype, "in_place": self.in_place}


def curves(rows: Sequence[Row]) -> list[Curve]:
    """A fit for each op, group, dtype and place with three sizes or more, in the order of the rows.

    Of the medians: a mean holds what else the machine did meanwhile, which is no property of the fabric.
    """
    apart: dict[tuple[str, str, bool], list[Row]] = {}
    for row in rows:
        if row.bytes and row.p50 > 0:
            apart.setdefault((row.op, row.dtype, row.in_place), []).append(row)
    found = []
    for (op, dtype, in_place), some in apart.items():
        # The fabric knows ops by their definition of busbw: an uneven all_to_all counts as one, and stays what it is.
        definition = OPERATIONS[op].definition or op
        points = [Point(definition, row.group, row.ranks, row.bytes, row.p50 * 1e-6) for row in some]
        found += [Curve(replace(each, op=op) if op != definition else each, dtype, in_place) for each in fit(points)]
    return found


def conclusion(curves: Sequence[Curve]) -> Advice | None:
    """Bucket sizes from the first dtype, each op as torch does it. None without fits."""
    chosen = [
        curve.fit for curve in curves if curve.dtype == curves[0].dtype and curve.in_place == _usual(curve, curves)
    ]
    return advice(chosen) if chosen else None


def _usual(curve: Curve, curves: Sequence[Curve]) -> bool:
    """The op's own place where it was measured, else the other."""
    native = OPERATIONS[curve.fit.op].native
    return native if any(c.in_place == native for c in curves if c.fit.op == curve.fit.op) else not native


def lines(curves: Sequence[Curve], found: Advice | None) -> list[str]:
    """For people: the fits as a table, and the advice."""
    if not curves:
        return []
    head = ("op", "group", "ranks", "latency (us)", "busbw (GB/s)", "half at", "saturated from")
    cells = [head, *(_cells(curve, curves) for curve in curves)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    text = ["# median time = latency + S * factor / busbw (+- standard errors):"]
    text += ["#  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
    if any(not curve.fit.follows for curve in curves):
        text.append("#  * the rows do not follow this line (another protocol inside the range, caches): read them")
    if found is not None:
        for bucket in found.buckets:
            shard = "" if bucket.shard_bytes == bucket.bytes else f" ({show(bucket.shard_bytes)} a rank)"
            text.append(f"# bucket for {bucket.use}: {show(bucket.bytes)}{shard}: {bucket.reason}")
        text += [f"# {note}" for note in found.notes]
    return text


def _cells(curve: Curve, curves: Sequence[Curve]) -> tuple[str, ...]:
    each = curve.fit
    name = each.op
    if len({c.dtype for c in curves}) > 1:
        name += f" {curve.dtype}"
    if len({c.in_place for c in curves if c.fit.op == each.op}) > 1:
        name += " in place" if curve.in_place else " out of place"
    if each.knee_bytes is not None:
        knee = show(each.knee_bytes)
    elif each.knee_estimate_bytes is not None:
        knee = f"about {show(each.knee_estimate_bytes)}: not measured"
    else:
        knee = "not seen"
    return (
        name + (" *" if not each.follows else ""),
        each.group,
        str(each.ranks),
        _with_error(each.alpha_us, each.alpha_error_us),
        _with_error(each.busbw_gbs, each.busbw_error_gbs),
        "-" if each.half_bytes is None else show(each.half_bytes),
        knee,
    )


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "not seen"
    return f"{value:.4g}" + ("" if error is None else f" +- {error:.2g}")
