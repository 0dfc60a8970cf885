"""Pictures: scaling curves, and the candidates of a search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.plan.ranking import Found
from launch.plan.sweep import Curves, Point


def check(path: Path) -> None:
    """Raises ValueError for a file that cannot become a picture, before anything is computed."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {path}: a picture ends in .png, .svg or .pdf")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {path.resolve().parent}")


def draw_curves(curves: Curves, path: Path, title: str) -> None:
    """Tokens a second (left) and the share of the smallest job's speed a GPU (right), against the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, share) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    ends: list[int] = []
    for name, points, color in (("strong", curves.strong, "tab:blue"), ("weak", curves.weak, "tab:orange")):
        runs = [point for point in points if point.forecast is not None]
        if not runs:
            continue
        gpus = [point.gpus for point in runs]
        ends += gpus
        speed.loglog(gpus, [_speed(point) for point in runs], "o-", color=color, markersize=4, label=name)
        shares = [100 * (curves.efficiency(points, point) or 0.0) for point in runs]
        share.semilogx(gpus, shares, "o-", color=color, markersize=4, label=name)
    if ends:
        first = next(p for p in (*curves.strong, *curves.weak) if p.forecast is not None and p.gpus == min(ends))
        alone = _speed(first) / first.gpus
        both = [min(ends), max(ends)]
        speed.loglog(both, [alone * n for n in both], ":", color="tab:gray", label="ideal")
        speed.legend()
        share.legend()
    speed.set(xlabel="GPUs", ylabel="tokens a second")
    share.set(xlabel="GPUs", ylabel="speed a GPU, % of the smallest job's", ylim=(0, None))
    for axes in (speed, share):
        axes.grid(alpha=0.25, which="both")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_search(found: Found, path: Path, title: str, most: int = 15) -> None:
    """Where the time of a step goes, for the best layouts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from launch.plan.reasons import NAMES, layout, parts

    best: Sequence = found.ranked[:most]
    figure, axes = pyplot.subplots(figsize=(11, 1.5 + 0.4 * len(best)), layout="constrained")
    labels = [layout(each) for each in best]
    names: list[str] = list(dict.fromkeys(key for each in best for key in parts(each)))
    left = [0.0] * len(best)
    for index, key in enumerate(names):
        widths = [parts(each).get(key, 0.0) for each in best]
        axes.barh(labels, widths, left=left, label=NAMES.get(key, key), color=pyplot.get_cmap("tab20")(index % 20))
        left = [a + b for a, b in zip(left, widths)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a step")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _speed(point: Point) -> float:
    assert point.forecast is not None
    return point.forecast.tokens_a_second
