from __future__ import annotations

import numpy as np
import pytest

from pretrain.data.blend import Blend
from pretrain.data.order import _splitmix64
from pretrain.data.permute import Permutation, hashed, mix


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 100, 1000])
def test_every_number_once_and_the_same_one_by_one(n: int) -> None:
    shuffled = Permutation(n, 7, 3)
    found = [shuffled(i) for i in range(n)]
    assert sorted(found) == list(range(n))
    assert shuffled.many(np.arange(n)).tolist() == found
    assert shuffled.many(np.tile(np.arange(n), 200)).tolist() == found * 200  # as arrays


def test_permutation_is_fixed_for_all_time() -> None:
    # A change here changes the data order of every checkpoint: give the order another version.
    assert [Permutation(10, 0)(i) for i in range(10)] == FIXED[0]
    assert [Permutation(10**9, 7, 3)(i) for i in range(3)] == FIXED[1]
    assert hashed(1, 2) == FIXED[2][0]
    assert mix(5) == int(_splitmix64(np.array([5], np.uint64))[0])


FIXED = ([7, 1, 6, 8, 3, 4, 5, 9, 0, 2], [50843615, 4964326, 315456218], [13608149317741381227])


@pytest.mark.parametrize("n", [10, 64])
def test_permutation_is_uniform_enough(n: int) -> None:
    places = np.zeros((n, n), int)
    keys = 200 * n
    for key in range(keys):
        places[np.arange(n), Permutation(n, key).many(np.arange(n))] += 1
    # 200 expected at each place, 14 = sqrt(200); the largest of n^2 such numbers is below 5.5 sigma.
    assert abs(places - 200).max() < 78


def test_keys_differ_in_every_part() -> None:
    keys = [(0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2), (1, 1, 1), (-1, 0, 1), (0, 0)]
    assert len({tuple(Permutation(50, *key).many(np.arange(50))) for key in keys}) == 7


@pytest.mark.parametrize(
    "weights",
    [
        (1.0,),
        (3, 1),
        (0.7, 0.2, 0.1),
        (1, 1, 1),
        (0.5, 0, 0.25, 0.25),
        (0.9, 0.05, 0.03, 0.02),
        (3.14159, 2.71828, 0.003),
    ],
)
def test_counts_stay_within_one_of_the_weights(weights: tuple[float, ...]) -> None:
    blend = Blend(weights)
    period = blend.period
    for numbers in (range(min(2 * period, 3000)), range(10**9 * period, 10**9 * period + 200)):
        counts = np.array(blend.counts(numbers[0]), object)
        for n in numbers:
            source, number = blend.at(n)
            assert number == counts[source]
            counts[source] += 1
            exact = [(n + 1) * share - count * period for share, count in zip(blend.shares, counts)]
            assert max(map(abs, exact)) < period, (n, counts)
        assert blend.counts(numbers[-1] + 1) == counts.tolist()
    wanted = np.array(weights) / sum(weights)
    np.testing.assert_allclose(np.array(blend.shares) / period, wanted, atol=0.5 / 65536)


def test_a_tenth_is_a_tenth() -> None:
    assert Blend([0.7, 0.2, 0.1]).shares == [7, 2, 1]
    assert Blend([50, 30, 20]).shares == [5, 3, 2]
    assert Blend([1.0, 1e-9]).shares[1] == 1  # too small for a share of the period, and not lost for that
