"""The picture of `python -m pretrain.data statistics`: lengths, bytes per token and shares, a colour for each source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.data.errors import UsageError
from pretrain.data.statistics import Statistics


def check(path: Path) -> None:
    """Raises ValueError for a file that cannot become a picture, before anything is counted."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {path}: a picture ends in .png, .svg or .pdf")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"--plot {path}: there is no folder {path.resolve().parent}")


def draw(found: Sequence[Statistics], path: Path) -> None:
    """Writes the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps, pyplot

    several = len({each.split for each in found}) > 1
    labels = [f"{each.name} ({each.split})" if several else each.name for each in found]
    colors = [colormaps["tab10"](number % 10) for number in range(len(found))]
    figure, (documents, tokens, rates, shares) = pyplot.subplots(
        1, 4, figsize=(17, 3.6 + 0.2 * len(found)), layout="constrained"
    )
    for each, label, color in zip(found, labels, colors):
        _steps(documents, each, 1, label, color)
        _steps(tokens, each, 2, label, color)
        if each.spread:
            bins = max(5, min(40, round(len(each.spread) ** 0.5)))
            rates.hist(each.spread, bins=bins, density=True, histtype="step", color=color, label=label)
            rates.axvline(each.bytes_per_token, color=color, linestyle=":", linewidth=1)
    for axes, what in ((documents, "documents"), (tokens, "tokens")):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="tokens of a document", ylabel=f"% of the {what}", title=f"{what} by length", ylim=(0, None))
    rates.set(xlabel="bytes per token of a document", ylabel="density", title="bytes per token (dots: of all)")
    documents.legend(fontsize="small")
    _shares(shares, found, labels)
    for axes in (documents, tokens, rates):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _steps(axes: Any, each: Statistics, column: int, label: str, color: Any) -> None:
    """Shares by length; documents without tokens are drawn as of half a token."""
    borders = [max(row[0], 0.5) for row in each.histogram]
    values = [row[column] for row in each.histogram]
    total = max(sum(values), 1)
    heights = [100 * value / total for value in values]
    axes.stairs(heights, [*borders, 2 * borders[-1]], color=color, label=label, linewidth=1.4)


def _shares(axes: Any, found: Sequence[Statistics], labels: Sequence[str]) -> None:
    """Bars: each source's share of its split's tokens, its bytes, and its weight in a run."""

    def parts(values: Sequence[float | None]) -> list[float]:
        sums = {
            each.split: sum(value or 0 for value, other in zip(values, found) if other.split == each.split)
            for each in found
        }
        return [100 * (value or 0) / (sums[each.split] or 1) for value, each in zip(values, found)]

    kinds: dict[str, list[float | None]] = {
        "tokens": [each.tokens for each in found],
        "bytes": [each.bytes for each in found],
        "weight": [each.weight for each in found],
    }
    kinds = {name: values for name, values in kinds.items() if any(value is not None for value in values)}
    height = 0.8 / len(kinds)
    for number, (name, values) in enumerate(kinds.items()):
        places = [row + (number + 0.5) * height - 0.4 for row in range(len(found))]
        bars = axes.barh(places, parts(values), 0.9 * height, label=name, color=f"C{7 + number % 3}")
        axes.bar_label(bars, fmt="%.0f", fontsize="x-small", padding=2)
    axes.set(xlabel="% of the split", title="share by source", xlim=(0, 115), yticks=range(len(found)))
    axes.set_yticklabels(labels)
    axes.invert_yaxis()
    axes.legend(fontsize="small")
