"""Which source each training sequence comes from: counts that never stray from the weights, found without counting.

Weights are taken as whole shares of a period of at most 65536 sequences. Within a period each next sequence goes to a
source by Tijdeman's rule for the chairman assignment problem (Discrete Mathematics 32, 1980), which keeps the number
of sequences of every source within 1 - 1 / (2K - 2) of its share after any number of them. A table of one period then
answers for every sequence number in constant time.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm

import numpy as np

PERIOD = 65536


class Blend:
    """Sequence number -> (source, number among that source's sequences). weights: positive or 0, of any sum, not all 0.

    shares: int [K], sequences of each source in a period; period: their sum. Weights that are no whole shares of 65536
    or fewer are rounded to such (the largest remainders up); a source with any weight keeps at least one share.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        assert weights and all(weight >= 0 for weight in weights) and any(weights)
        self.shares = _shares(weights)
        self.period = sum(self.shares)
        self._source, self._number = _table(tuple(self.shares))

    def at(self, sequence: int) -> tuple[int, int]:
        """(source, its sequence number) of sequence number `sequence`, from 0 without end."""
        turn, place = divmod(sequence, self.period)
        source = int(self._source[place])
        return source, turn * self.shares[source] + int(self._number[place])

    def many(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`at` of many: (sources, their sequence numbers), int64."""
        turns, places = np.divmod(sequences, self.period)
        sources = self._source[places].astype(np.int64)
        return sources, turns * np.array(self.shares)[sources] + self._number[places]

    def counts(self, sequences: int) -> list[int]:
        """How many of the first `sequences` sequences come from each source."""
        turn, place = divmod(sequences, self.period)
        begun = np.bincount(self._source[:place], minlength=len(self.shares))
        return [turn * share + int(more) for share, more in zip(self.shares, begun)]


def _shares(weights: Sequence[float]) -> list[int]:
    # Through their decimal notation: 0.1 in a configuration means a tenth.
    exact = [Fraction(str(weight)) for weight in weights]
    whole = lcm(*(weight.denominator for weight in exact))
    shares = [int(weight * whole) for weight in exact]
    divisor = gcd(*shares)
    shares = [share // divisor for share in shares]
    total = sum(shares)
    if total <= PERIOD:
        return shares
    rounded = [share * PERIOD // total for share in shares]
    rest = sorted(range(len(shares)), key=lambda k: (-(shares[k] * PERIOD % total), k))
    for k in rest[: PERIOD - sum(rounded)]:
        rounded[k] += 1
    return [max(made, 1) if share else 0 for made, share in zip(rounded, shares)]


@lru_cache(maxsize=32)
def _table(shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(source, number) of every sequence of a period, int16 and int32 [period]."""
    period, used = sum(shares), [k for k, share in enumerate(shares) if share]
    source = np.empty(period, np.int16)
    number = np.empty(period, np.int32)
    slack = max(2 * len(used) - 2, 1)
    taken = [0] * len(shares)
    for n in range(1, period + 1):
        # In units of 1 / (period * slack): owed = n w - taken, and who is owed 1 / slack or more may be next. First comes
        # the one whose debt reaches 1 - 1 / slack soonest: (1 - 1 / slack - owed) / w, compared without division.
        best, best_due, best_share = -1, 0, 1
        for k in used:
            owed = (n * shares[k] - taken[k] * period) * slack
            if owed >= period or len(used) == 1:
                due = period * (slack - 1) - owed
                if best < 0 or due * best_share < best_due * shares[k]:
                    best, best_due, best_share = k, due, shares[k]
        assert best >= 0, "of several sources one is always owed something"
        source[n - 1], number[n - 1] = best, taken[best]
        taken[best] += 1
    return source, number
