"""A permutation of range(n) in no memory: any element of it is computed from its number alone.

A Feistel network (Luby and Rackoff, SIAM J. Comput. 1988) permutes the numbers of as many bits as n needs; one that
falls outside range(n) is permuted again until it falls inside (cycle walking: Black and Rogaway, CT-RSA 2002), which is
a permutation of range(n) and takes less than two turns on average. The halves may differ by a bit: each round changes
one of them by a hash of the other, which can be undone whatever their widths.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_ROUNDS = 6
_FEW = 128  # numbers for which Python's integers are quicker than arrays
_MASK = (1 << 64) - 1


def mix(x: int) -> int:
    """splitmix64 (Steele, Lea and Flood, OOPSLA 2014) of one 64-bit number; as order._splitmix64 computes it."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def hashed(*key: int) -> int:
    """A 64-bit number fixed by the integers in `key` for all time."""
    state = 0
    for part in key:
        state = mix(state ^ (part & _MASK))
    return state


def _mix_all(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A permutation of range(n), fixed by the integers in `key` for all time: a checkpoint's order of data hangs on it."""

    def __init__(self, n: int, *key: int) -> None:
        assert 0 < n < 1 << 62
        self.n = n
        bits = max((n - 1).bit_length(), 1)
        self._low = bits // 2
        self._low_mask = (1 << self._low) - 1
        self._high_mask = (1 << (bits - self._low)) - 1
        state = hashed(*key)
        self._keys = [mix(state ^ turn) for turn in range(_ROUNDS)]
        self._pairs = list(zip(self._keys[::2], self._keys[1::2]))

    def __call__(self, i: int) -> int:
        """The element at place i."""
        assert 0 <= i < self.n
        while True:
            high, low = i >> self._low, i & self._low_mask
            # `mix` written out: calling it would take longer than it does.
            for even, odd in self._pairs:
                x = ((low ^ even) + 0x9E3779B97F4A7C15) & _MASK
                x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
                x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
                high ^= (x ^ (x >> 31)) & self._high_mask
                x = ((high ^ odd) + 0x9E3779B97F4A7C15) & _MASK
                x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
                x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
                low ^= (x ^ (x >> 31)) & self._low_mask
            i = high << self._low | low
            if i < self.n:
                return i

    def many(self, places: np.ndarray) -> np.ndarray:
        """The elements at many places: int64 [n] to int64 [n]."""
        if len(places) < _FEW:
            return np.array([self(place) for place in places.tolist()], np.int64)
        found = np.asarray(places).astype(np.uint64)
        left = np.arange(found.size)
        shift, low_mask, high_mask = np.uint64(self._low), np.uint64(self._low_mask), np.uint64(self._high_mask)
        while left.size:
            at = found[left]
            high, low = at >> shift, at & low_mask
            for turn in range(0, _ROUNDS, 2):
                high ^= _mix_all(low ^ np.uint64(self._keys[turn])) & high_mask
                low ^= _mix_all(high ^ np.uint64(self._keys[turn + 1])) & low_mask
            at = high << shift | low
            found[left] = at
            left = left[at >= np.uint64(self.n)]
        return found.astype(np.int64)


@lru_cache(maxsize=64)
def permutation_of(n: int, *key: int) -> Permutation:
    """A Permutation, kept: those of an epoch are asked for at every step."""
    return Permutation(n, *key)
