from __future__ import annotations

import numpy as np
import pytest

from pretrain.data.order import Order, Span, cut, permutation

LENGTHS = np.array([5, 1, 0, 17, 3, 40, 2, 9])


def read(order: Order, sequence: int) -> list[tuple[int, int]]:
    """(document, place) of every token of a sequence."""
    return [(s.document, s.start + i) for s in order.spans(sequence) for i in range(s.length)]


def test_permutation_is_fixed_for_all_time() -> None:
    # A change here changes the data order of every checkpoint: raise ORDER_VERSION.
    assert permutation(10, 0).tolist() == [1, 4, 5, 7, 6, 9, 0, 3, 2, 8]
    assert permutation(10, 7, 3, 1).tolist() == [8, 1, 5, 3, 2, 6, 4, 0, 7, 9]
    assert sorted(permutation(1000, 5, 2).tolist()) == list(range(1000))


def test_permutations_differ_by_every_part_of_the_key() -> None:
    seen = {tuple(permutation(50, *key)) for key in [(0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2), (1, 1, 1), (-1, 0, 1)]}
    assert len(seen) == 6


def test_permutation_is_uniform_enough() -> None:
    # Over many keys each value stands at each place equally often: 2000/10 = 200 expected, 5 sigma = 67.
    places = np.zeros((10, 10), int)
    for key in range(2000):
        places[np.arange(10), permutation(10, key)] += 1
    assert abs(places - 200).max() < 67


def test_cut_skips_empty_documents_and_joins_the_rest() -> None:
    ends = np.cumsum(LENGTHS)
    assert cut(ends, None, 0, 6) == [Span(0, 0, 5), Span(1, 0, 1)]
    assert cut(ends, None, 4, 4) == [Span(0, 4, 1), Span(1, 0, 1), Span(3, 0, 2)]
    assert cut(ends, np.arange(8)[::-1], 5, 1) == [Span(6, 0, 1)]


@pytest.mark.parametrize("length", [1, 4, 7, 76])
def test_each_token_is_a_target_once_an_epoch(length: int) -> None:
    order = Order(LENGTHS, length, seed=0)
    assert order.windows_per_epoch == (77 - 1) // length
    for epoch in range(3):
        first = epoch * order.windows_per_epoch
        sequences = [read(order, first + i) for i in range(order.windows_per_epoch)]
        assert all(len(s) == length + 1 for s in sequences)
        targets = [token for s in sequences for token in s[1:]]
        assert len(targets) == len(set(targets)) == order.windows_per_epoch * length
        # Windows overlap by one token: each but the stream's last ends with the input that another begins with.
        assert len({s[0] for s in sequences} & {s[-1] for s in sequences}) == order.windows_per_epoch - 1


def test_documents_run_forward_and_stay_whole_between_cuts() -> None:
    order = Order(LENGTHS, 4, seed=1)
    for i in range(order.windows_per_epoch):
        for a, b in zip(order.spans(i), order.spans(i)[1:]):
            assert a.start + a.length == LENGTHS[a.document]
            assert b.start == 0


def test_epochs_and_seeds_differ_and_position_needs_no_history() -> None:
    walked = Order(LENGTHS, 4, seed=1)
    sequences = [read(walked, i) for i in range(5 * walked.windows_per_epoch)]
    epochs = [sequences[i * 19 : (i + 1) * 19] for i in range(5)]
    assert len({str(epoch) for epoch in epochs}) == 5
    # Documents and windows are both shuffled anew: where a document's first token stands in its window moves with the
    # documents' order, which window comes first with the windows'.
    shuffles = [walked._epoch(epoch) for epoch in range(5)]
    assert len({tuple(documents) for documents, _, _ in shuffles}) == 5
    assert len({tuple(windows) for _, _, windows in shuffles}) == 5
    assert read(Order(LENGTHS, 4, seed=2), 0) != sequences[0] or read(Order(LENGTHS, 4, seed=2), 1) != sequences[1]
    for i in (94, 0, 40, 3, 93):
        assert read(Order(LENGTHS, 4, seed=1), i) == sequences[i]
        assert read(walked, i) == sequences[i]


def test_bad_arguments() -> None:
    with pytest.raises(
        ValueError, match="77 tokens, too few for one sequence of 77 \\+ 1: lower sequence_length to at most 76"
    ):
        Order(LENGTHS, 77, 0)
    with pytest.raises(ValueError, match="at least 1"):
        Order(LENGTHS, 0, 0)
    with pytest.raises(ValueError, match="start at 0"):
        Order(LENGTHS, 4, 0).spans(-1)
