"""How often a job fails, and how often it should save.

Young 1974 (Communications of the ACM 17, 530), Daly 2006 (Future Generation Computer Systems 22, 303). Failures of nodes are
independent and memoryless; any one of them ends the step for all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Grattafiori et al. 2024 (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days on 2048 nodes.
LLAMA_NODE_MTBF = 2048 * 54 * 86400 / 419


def young(save: float, mtbf: float) -> float:
    """Seconds of work between saves that cost `save` seconds each, to first order."""
    return math.sqrt(2.0 * save * mtbf)


def daly(save: float, mtbf: float) -> float:
    """The same to higher order (Daly 2006, eq. 37), for saves that are not short beside the time between failures."""
    if save >= 2.0 * mtbf:
        return mtbf
    ratio = save / (2.0 * mtbf)
    return young(save, mtbf) * (1.0 + math.sqrt(ratio) / 3.0 + ratio / 9.0) - save


def efficiency(interval: float, save: float, mtbf: float, restart: float) -> float:
    """Share of the wall time that is work that counts, with a save after every `interval` seconds of work (Daly 2006, eq. 20).

    0 where failures come so fast that nothing gets done.
    """
    if interval <= 0.0:
        return 0.0
    exponent = (interval + save) / mtbf
    if exponent > 500.0 or restart / mtbf > 500.0:
        return 0.0
    return interval / (mtbf * math.exp(restart / mtbf) * math.expm1(exponent))


@dataclass(frozen=True)
class Failures:
    """Seconds, but `per_day`. save: what one save costs training. interval: work between saves, by Daly; young: by Young.

    steps: of the interval, at least one. efficiency: at that many steps. configured: the same at configured_steps.
    writing: of a save to storage, beside training; a shorter interval would wait for it.
    """

    nodes: int
    mtbf: float
    per_day: float
    save: float
    writing: float
    restart: float
    young: float
    interval: float
    steps: int
    efficiency: float
    configured_steps: int
    configured: float


def failures(
    nodes: int,
    node_mtbf: float,
    save: float,
    writing: float,
    restart: float,
    step: float,
    configured_steps: int,
) -> Failures:
    """All times in seconds and above zero (save and restart may be zero)."""
    mtbf = node_mtbf / nodes
    best = max(daly(save, mtbf), writing, step)
    steps = max(1, round(best / step))
    return Failures(
        nodes,
        mtbf,
        86400.0 / mtbf,
        save,
        writing,
        restart,
        young(save, mtbf),
        steps * step,
        steps,
        efficiency(steps * step, save, mtbf, restart),
        configured_steps,
        efficiency(configured_steps * step, save, mtbf, restart),
    )
