"""Cutting a list of layers into stages of nearly equal cost."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence


def cut(costs: Sequence[float], stages: int, first_extra: float = 0.0, last_extra: float = 0.0) -> list[range]:
    """Runs of layers, one for each stage, such that the dearest stage is as cheap as it can be.

    costs: of each layer, in any unit. first_extra, last_extra: what the first and the last stage do besides (embedding; head and
    loss). Among equally good cuts, the one with the smallest sum of squared costs. Every stage gets a layer, but where there is
    an extra the first or the last may do with that alone. Raises ValueError when there are too few layers.
    """
    return list(_cut(tuple(costs), stages, first_extra, last_extra))


@functools.lru_cache(maxsize=256)  # who compares layouts asks the same many times
def _cut(costs: tuple[float, ...], stages: int, first_extra: float, last_extra: float) -> tuple[range, ...]:
    if stages < 1 or stages == 1:
        if stages < 1:
            raise ValueError(f"{stages} stages: at least one is needed")
        return (range(len(costs)),)
    fewest = stages - (first_extra > 0) - (last_extra > 0)
    if len(costs) < fewest:
        raise ValueError(
            f"{len(costs)} layers cannot be cut into {stages} pipeline stages; "
            f"make mesh.pp x mesh.pp_virtual at most {len(costs) + stages - fewest}, or add layers"
        )
    sums = [0.0, *itertools.accumulate(costs)]

    def cost(stage: int, start: int, stop: int) -> float:
        extra = first_extra * (stage == 0) + last_extra * (stage == stages - 1)
        if start == stop and not extra:
            return math.inf
        return sums[stop] - sums[start] + extra

    dearest, _ = _best(len(costs), stages, cost, max)
    limit = dearest * (1 + 1e-9)  # sums of floats in another order
    _, ends = _best(len(costs), stages, cost, lambda total, c: total + c * c if c <= limit else math.inf)
    return tuple(itertools.starmap(range, itertools.pairwise([0, *ends])))


def _best(
    layers: int, stages: int, cost: Callable[[int, int, int], float], fold: Callable[[float, float], float]
) -> tuple[float, list[int]]:
    """(the smallest value of fold over the stages' costs, where each stage ends): dynamic programming over (stage, layers)."""
    value = {0: 0.0}  # of the best way to put the first `stop` layers into the stages so far
    choices: list[dict[int, int]] = []
    for stage in range(stages):
        ways = {
            stop: min((fold(value[start], cost(stage, start, stop)), start) for start in value if start <= stop)
            for stop in ([layers] if stage == stages - 1 else range(layers + 1))
        }
        value = {stop: way[0] for stop, way in ways.items()}
        choices.append({stop: way[1] for stop, way in ways.items()})
    ends = [layers]
    for choice in reversed(choices[1:]):
        ends.append(choice[ends[-1]])
    return value[layers], ends[::-1]
