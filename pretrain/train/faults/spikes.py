"""Is this step's loss or gradient norm far above those of the steps before it?

The median and the median absolute deviation stay where they are while fewer than half of a window's steps are odd, so one spike
neither hides the next nor raises the bar for it, as it would with mean and standard deviation. The idea to compare with a rolling
window and to leave such steps out is OLMo's (OLMo 2, arXiv 2501.00656, and its SkipStepAdamW: 128 steps, 6 standard deviations);
for gradient norms, which vary by factors, a factor of the median takes the place of deviations.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from pretrain.train.faults.config import FaultsConfig

NORMAL = 1.4826  # standard deviations of a normal distribution in a median absolute deviation


def spike(window: Sequence[Sequence[float]], loss: float, norm: float, config: FaultsConfig) -> str | None:
    """Why this is a spike, or None. window: (loss, norm) of the latest steps; all numbers finite.

    Plain arithmetic on numbers that all ranks have alike: so is the answer.
    """
    if len(window) < config.history:
        return None
    losses = [pair[0] for pair in window]
    middle = median(losses)
    deviation = max(NORMAL * median(abs(one - middle) for one in losses), config.loss_floor * abs(middle), 1e-12)
    if loss > middle + config.loss_factor * deviation:
        return f"the loss {loss:.4g} is {(loss - middle) / deviation:.1f} deviations above {middle:.4g}"
    usual = median(pair[1] for pair in window)
    if config.norm_factor is not None and norm > config.norm_factor * usual:
        return f"the gradient norm {norm:.4g} is {norm / max(usual, 1e-300):.3g} times the usual {usual:.4g}"
    return None
