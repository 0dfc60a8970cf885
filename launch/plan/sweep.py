"""Strong and weak scaling: the same job on 1 to 100 000 GPUs.

strong: the batch stays. weak: the sequences a GPU and step stay, as many as the configuration has on its own number of GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from launch.plan.forecast import Forecast
from launch.plan.ranking import Found
from launch.plan.search import Search
from launch.plan.source import MOST_GPUS, with_
from pretrain.config import RunConfig

COUNTS = (1, 2, 4, 8, 32, 128, 512, 2048, 8192, 32_768, MOST_GPUS)


@dataclass(frozen=True)
class Point:
    """One number of GPUs: the fastest layout there is, or why there is none."""

    gpus: int
    forecast: Forecast | None
    refusal: str = ""


@dataclass
class Curves:
    strong: list[Point] = field(default_factory=list)
    weak: list[Point] = field(default_factory=list)
    interrupted: bool = False

    def efficiency(self, points: Sequence[Point], point: Point) -> float | None:
        """Tokens a second and GPU, against the smallest number of GPUs on which the job runs."""
        first = next((each for each in points if each.forecast is not None), None)
        if first is None or first.forecast is None or point.forecast is None:
            return None
        alone = first.forecast.tokens_a_second / first.gpus
        return point.forecast.tokens_a_second / point.gpus / alone


def curves(
    search: Search,
    config: RunConfig,
    gpus: int,
    counts: Sequence[int] = COUNTS,
    keep_layout: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Curves:
    """gpus: on which the configuration's batch is meant. keep_layout: its own layout, with more or fewer data-parallel ranks.

    On Ctrl-C, the points so far.
    """
    found = Curves()
    share = max(1, round(config.train.batch / gpus))
    try:
        for index, count in enumerate(counts):
            progress(index, len(counts))
            found.strong.append(_point(search, config, count, keep_layout))
            weak = with_(config, train={"batch": share * count})
            found.weak.append(_point(search, weak, count, keep_layout))
    except KeyboardInterrupt:
        found.interrupted = True
        del found.strong[len(found.weak) :]
    return found


def _point(search: Search, config: RunConfig, gpus: int, keep_layout: bool) -> Point:
    if keep_layout:
        return _same(search, config, gpus)
    result = search.run(config, gpus, quick=True)
    if result.ranked:
        return Point(gpus, result.ranked[0])
    return Point(gpus, None, no_layout(result))


def _same(search: Search, config: RunConfig, gpus: int) -> Point:
    one = with_(config, mesh={"dp": None})
    try:
        grid = one.mesh.grid(gpus)
    except ValueError as error:
        return Point(gpus, None, str(error))
    reason = search.legality.refusal(one, grid)
    if reason is not None:
        return Point(gpus, None, reason)
    forecast = search.planner.forecast(one, grid)
    if not forecast.fits:
        return Point(gpus, None, f"does not fit: {forecast.excess / 2**30:.4g} GiB a rank too much")
    return Point(gpus, forecast)


def no_layout(result: Found) -> str:
    """Why a search found nothing, in one line."""
    if result.closest is not None:
        return f"nothing fits: the closest layout lacks {result.closest.excess / 2**30:.4g} GiB a rank"
    if result.refused:
        most = max(result.refused, key=lambda refused: refused.count)
        return f"no legal layout: {most.reason}"
    return "no legal layout"
