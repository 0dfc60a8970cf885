"""Command-line: `python -m parallel.fabric results.json`: latency, bandwidth, knee of collectives, and what follows from them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from parallel.fabric import results
from parallel.fabric.fit import LEVEL, Advice, Fit, advice, fit, readable
from parallel.fabric.topology import Fabric
from parallel.fabric.writing import write_key


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m parallel.fabric",
        description="Fits latency and bandwidth to the results of `python -m parallel.bench --json FILE`, finds the smallest "
        "size that saturates the fabric, and recommends the bucket for gradients.",
    )
    made.add_argument("results", type=Path, help="JSON file of the benchmark")
    made.add_argument("--group", help="the group that gradients are summed over; default: the largest measured")
    made.add_argument(
        "--level", type=float, default=LEVEL, help=f"share of the bandwidth that counts as saturated ({LEVEL})"
    )
    made.add_argument(
        "--write-config", type=Path, metavar="RUN.yaml", help="set engine.bucket_bytes in a training config"
    )
    made.add_argument("--write-hardware", type=Path, metavar="FILE.yaml", help="set fabric.measured in a hardware file")
    made.add_argument("--json", type=Path, metavar="FILE", help="write fits and advice")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 nothing to recommend although a config should get it, 2 bad usage."""
    options = parser().parse_args(arguments)
    try:
        document = results.read(options.results)
        rows = results.rows(document)
        names = list(dict.fromkeys(row.group for row in rows))
        if options.group is not None and options.group not in names:
            raise ValueError(
                f"--group {options.group}: not measured; {options.results} has {', '.join(names) or 'no group'}"
            )
        fits = fit(rows, options.level)
        advised = advice(fits, options.group)
        report(fits, advised, bool(document.get("complete", True)))
        if options.json is not None:
            content = {"fits": [asdict(each) for each in fits], "advice": asdict(advised)}
            options.json.write_text(json.dumps(content, indent=1) + "\n")
            print(f"written: {options.json}")
        if options.write_hardware is not None:
            _write_hardware(options.write_hardware, results.measured(document, fits))
        if options.write_config is not None:
            if advised.bucket_bytes is None:
                print(f"{options.write_config} stays as it is: there is no recommendation", file=sys.stderr)
                return 1
            _write_config(options.write_config, advised.bucket_bytes)
    except (ValueError, OSError) as error:
        print(f"fabric: {error}", file=sys.stderr)
        return 2
    return 0


def report(fits: Sequence[Fit], advised: Advice, complete: bool = True) -> None:
    """Prints one line for each op and group, and the advice."""
    if not complete:
        print("the benchmark was stopped before its end; these are fits of what there is")
    cells = [("op", "group", "ranks", "alpha, us", "busbw, GB/s", "half at", "knee", "scatter")]
    marks: list[str] = []
    for each in fits:
        knee = "-" if each.knee_bytes is None else readable(each.knee_bytes)
        if each.knee_bytes is None and each.knee_estimate_bytes is not None:
            knee = f"~{readable(each.knee_estimate_bytes)}"
        bandwidth = "not seen" if each.busbw_gbs is None else _plus(each.busbw_gbs, each.busbw_error_gbs)
        half = "-" if each.half_bytes is None else readable(each.half_bytes)
        alpha = _plus(each.alpha_us, each.alpha_error_us)
        cells.append((each.op, each.group, str(each.ranks), alpha, bandwidth, half, knee, f"{100 * each.spread:.1f} %"))
        if not each.follows:
            marks.append(f"{each.op} over {each.group} is no straight line: its knee is read off the rows")
        if each.outliers:
            sizes = ", ".join(map(readable, each.outliers))
            marks.append(f"{each.op} over {each.group}: far from the line, without weight: {sizes}")
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells if fits else []:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    if not fits:
        print("nothing to fit: a fit needs three sizes or more of one op over two ranks or more")
    for line in [*marks, *advised.notes]:
        print(line)
    for bucket in advised.buckets:
        shard = "" if bucket.shard_bytes == bucket.bytes else f", {readable(bucket.shard_bytes)} for each rank"
        print(f"{bucket.use}: {readable(bucket.bytes)} a call{shard}: {bucket.reason}")
    if advised.bucket_bytes is not None:
        print(f"for a training config: engine.bucket_bytes={advised.bucket_bytes}")


def _plus(value: float, error: float | None) -> str:
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _write_hardware(path: Path, entries: list[dict[str, Any]]) -> None:
    if not entries:
        raise ValueError(f"{path} stays as it is: no bandwidth was seen; measure larger sizes")
    try:
        section = (yaml.safe_load(path.read_text()) or {}).get("fabric")
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise ValueError(f"{path}: not a hardware file: {' '.join(str(error).split())}") from None
    if not isinstance(section, dict):
        raise ValueError(
            f"{path}: has no fabric section; begin one, such as fabric: {{node: {{kind: switch, gpus: 8, gpu_gbs: 450}}}}"
        )
    try:
        Fabric.model_validate({**section, "measured": entries})
    except ValidationError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    write_key(path, "fabric.measured", entries)
    print(f"{path}: fabric.measured = {len(entries)} entries")


def _write_config(path: Path, size: int) -> None:
    try:
        sections = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a training config: {' '.join(str(error).split())}") from None
    if not isinstance(sections, dict) or "train" not in sections:
        raise ValueError(f"{path}: not a training config: it has no train section")
    before = write_key(path, "engine.bucket_bytes", size)
    print(f"{path}: engine.bucket_bytes = {size}" + ("" if before is None else f" (was {before})"))


if __name__ == "__main__":
    sys.exit(main())
