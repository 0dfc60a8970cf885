"""The picture: time and bandwidth against message size, a row of two panels an op, a curve for each group size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from parallel.bench.rows import Row
from parallel.bench.sizes import show

Key = tuple[str, int, str, bool]


def curves(rows: Sequence[Row]) -> dict[str, dict[Key, list[Row]]]:
    """{op: {(group, ranks, dtype, in place): rows by size}}; ops without sizes are left out."""
    found: dict[str, dict[Key, list[Row]]] = {}
    for row in rows:
        if row.bytes:
            found.setdefault(row.op, {}).setdefault((row.group, row.ranks, row.dtype, row.in_place), []).append(row)
    for lines in found.values():
        for line in lines.values():
            line.sort(key=lambda row: row.bytes)
    return found


def labels(keys: Sequence[Key]) -> list[str]:
    """The group and its ranks, and of dtype and place what tells the curves apart."""
    dtypes, places = len({key[2] for key in keys}) > 1, len({key[3] for key in keys}) > 1
    return [
        f"{group} ({ranks} rank{'s' * (ranks > 1)})"
        + (f", {dtype}" if dtypes else "")
        + ((", in place" if in_place else ", out of place") if places else "")
        for group, ranks, dtype, in_place in keys
    ]


def draw(rows: Sequence[Row], path: Path, title: str) -> bool:
    """Writes the picture. False, and no file, where no row has a size."""
    found = curves(rows)
    if not found:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure, panels = pyplot.subplots(
        len(found), 2, figsize=(11, 3.4 * len(found) + 0.6), layout="constrained", squeeze=False
    )
    for (op, lines), (times, speeds) in zip(found.items(), panels):
        keys = list(lines)
        for label, key, color in zip(labels(keys), keys, _colors(len(keys))):
            sizes = [row.bytes for row in lines[key]]
            mean = [row.microseconds for row in lines[key]]
            times.plot(sizes, mean, marker="o", markersize=3, color=color, label=label)
            times.fill_between(
                sizes,
                [row.min for row in lines[key]],
                [row.p95 for row in lines[key]],
                color=color,
                alpha=0.15,
                linewidth=0,
            )
            bus = [row.algbw if row.busbw is None else row.busbw for row in lines[key]]
            speeds.plot(sizes, bus, marker="o", markersize=3, color=color, label=label)
        times.set_yscale("log")
        times.set_ylabel("microseconds (mean; shade: min to p95)")
        alone = all(row.busbw is None for line in lines.values() for row in line)
        speeds.set_ylabel("algbw, GB/s" if alone else "busbw, GB/s")
        speeds.set_ylim(bottom=0)
        for axes in (times, speeds):
            axes.set_title(op)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: show(size)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("size S (nccl-tests convention)")
            axes.grid(alpha=0.25)
        speeds.legend(fontsize="small")
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _colors(count: int) -> list[tuple[float, float, float, float]]:
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](i) for i in range(count)]
    return [colormaps["viridis"](i / (count - 1)) for i in range(count)]
