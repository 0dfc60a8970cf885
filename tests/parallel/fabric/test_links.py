"""Slow links, ranks and nodes named in matrices that were made with them, and nobody in matrices without."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from parallel.fabric.fit import fit
from parallel.fabric.links import Finding, Matrix, Place, relation, rounds

SIZES = [8, 1 << 20]


def cluster(nodes: int, near: int) -> list[Place]:
    return [Place(node * near + local, f"node-{node}", node, local) for node in range(nodes) for local in range(near)]


def matrix(places: list[Place], noise: float = 0.03, seed: int = 0) -> Matrix:
    """5 us and 50 GB/s inside a node, 20 us and 10 GB/s between nodes."""
    rng = np.random.default_rng(seed)
    made = Matrix.empty(SIZES, places)
    for one in places:
        for other in places:
            if one.rank != other.rank:
                latency, busbw = (5e-6, 50e9) if one.node == other.node else (20e-6, 10e9)
                small, large = np.exp(noise * rng.standard_normal(2))
                latency *= small
                made.put(one.rank, other.rank, [latency, latency + (SIZES[1] - SIZES[0]) / busbw * large])
    made.compute[:] = 1e-3 * np.exp(0.03 * rng.standard_normal(len(places)))
    return made


def slow_transfer(made: Matrix, rows: object, columns: object, times: float) -> None:
    transfer = made.seconds[1] - made.seconds[0]
    transfer[rows, columns] *= times  # type: ignore[index]
    made.seconds[1] = made.seconds[0] + transfer


def short(findings: list[Finding]) -> list[tuple[str, str, tuple[int, ...], str]]:
    return [(each.kind, each.what, each.ranks, each.direction) for each in findings]


@pytest.mark.parametrize(("nodes", "near"), [(1, 2), (1, 3), (1, 8), (4, 1), (4, 8)])
def test_nobody_is_named_where_all_are_alike(nodes: int, near: int) -> None:
    for seed in range(20):
        assert matrix(cluster(nodes, near), 0.03, seed).findings(1.25) == []


@pytest.mark.parametrize(("nodes", "near"), [(1, 3), (1, 4), (4, 1), (2, 4), (4, 8)])
def test_one_slow_link(nodes: int, near: int) -> None:
    places = cluster(nodes, near)
    made = matrix(places)
    slow_transfer(made, 0, 1, 3.0)
    slow_transfer(made, 1, 0, 2.0)
    (found,) = made.findings(1.25)
    assert short([found]) == [("link", "bandwidth", (0, 1), "both")]
    assert found.ratio == pytest.approx(3.0, rel=0.15)
    assert "rank 0" in found.text(places) and "<->" in found.text(places)


def test_one_direction_of_a_link() -> None:
    made = matrix(cluster(1, 4))
    slow_transfer(made, 3, 1, 4.0)
    (found,) = made.findings(1.25)
    assert short([found]) == [("link", "bandwidth", (3, 1), "send")]
    assert "rank 3 (node-0, local 3) -> rank 1" in found.text(made.places)


def test_two_ranks_can_compare_their_directions_only() -> None:
    made = matrix(cluster(1, 2))
    slow_transfer(made, 1, 0, 2.0)
    assert short(made.findings(1.25)) == [("link", "bandwidth", (1, 0), "send")]


def test_a_link_with_a_long_way() -> None:
    made = matrix(cluster(4, 1))
    for one, other in ((2, 3), (3, 2)):
        made.seconds[:, one, other] += 80e-6
    (found,) = made.findings(1.25)
    assert short([found]) == [("link", "latency", (2, 3), "both")]
    assert found.ratio == pytest.approx(5, rel=0.15)


@pytest.mark.parametrize(("nodes", "near"), [(1, 3), (1, 4), (1, 8), (4, 1)])
def test_one_slow_rank(nodes: int, near: int) -> None:
    """It makes half of four ranks' links slow; still it is the rank that is named, and its links are not."""
    for rank in range(nodes * near):
        made = matrix(cluster(nodes, near), seed=rank)
        slow_transfer(made, rank, slice(None), 2.0)
        slow_transfer(made, slice(None), rank, 2.0)
        found = made.findings(1.25)
        assert short(found) == [("rank", "bandwidth", (rank,), "both")]
        assert found[0].slow == found[0].links == 2 * (nodes * near - 1)


def test_some_slow_links_do_not_make_a_slow_rank() -> None:
    """Four of seven: they are named one by one."""
    made = matrix(cluster(1, 8))
    slow_transfer(made, 0, [1, 2, 3, 4], 3.0)
    found = short(made.findings(1.25))
    assert sorted(found) == [("link", "bandwidth", (0, other), "send") for other in (1, 2, 3, 4)]


def test_a_rank_that_receives_slowly() -> None:
    made = matrix(cluster(1, 8))
    slow_transfer(made, slice(None), 5, 2.0)
    assert short(made.findings(1.25)) == [("rank", "bandwidth", (5,), "receive")]


def test_a_card_that_is_slow_to_other_nodes() -> None:
    """Its rank is slow on the network and not inside its node."""
    places = cluster(4, 8)
    made = matrix(places)
    others = [place.rank for place in places if place.node != 1]
    slow_transfer(made, 9, others, 3.0)
    slow_transfer(made, others, 9, 3.0)
    found = made.findings(1.25)
    assert {(each.kind, each.ranks, each.relation) for each in found} == {
        ("rank", (9,), "along a rail"),
        ("rank", (9,), "across rails"),
    }


def test_a_slow_node_is_one_finding_a_kind_of_link() -> None:
    places = cluster(6, 4)
    made = matrix(places)
    inside, outside = [4, 5, 6, 7], [place.rank for place in places if place.node != 1]
    for rank in inside:
        slow_transfer(made, rank, outside, 3.0)
        slow_transfer(made, outside, rank, 3.0)
    found = made.findings(1.25)
    assert {(each.kind, each.ranks) for each in found} == {("node", tuple(inside))}
    assert "slow node: node-1" in found[0].text(places)


def test_a_slow_rank_with_a_link_that_is_worse() -> None:
    made = matrix(cluster(1, 8))
    slow_transfer(made, 2, slice(None), 2.0)
    slow_transfer(made, slice(None), 2, 2.0)
    slow_transfer(made, 2, 6, 5.0)
    assert short(made.findings(1.25)) == [("link", "bandwidth", (2, 6), "send"), ("rank", "bandwidth", (2,), "both")]


def test_a_rank_that_computes_slowly_comes_first() -> None:
    made = matrix(cluster(1, 4))
    made.compute[3] *= 1.6
    slow_transfer(made, 0, 1, 5.0)
    found = made.findings(1.25)
    assert short(found) == [("rank", "compute", (3,), "both"), ("link", "bandwidth", (0, 1), "send")]
    assert "computes 1.6 times as long" in found[0].text(made.places)


def test_links_that_scatter_need_more_to_stand_out() -> None:
    places = cluster(1, 8)
    for seed in range(10):
        made = matrix(places, noise=0.2, seed=seed)
        assert made.findings(1.25) == []
        slow_transfer(made, 4, 5, 10.0)
        assert short(made.findings(1.25)) == [("link", "bandwidth", (4, 5), "send")]


def test_kinds_of_links_are_not_compared_with_each_other() -> None:
    places = cluster(2, 2)
    assert [relation(places[0], places[rank]) for rank in (1, 2, 3)] == [
        "inside a node",
        "along a rail",
        "across rails",
    ]
    made = matrix(places, noise=0.0)
    assert made.bandwidth[0, 1] == pytest.approx(50)
    assert made.bandwidth[0, 2] == pytest.approx(10)
    assert made.findings(1.25) == []


def test_what_was_not_measured_is_left_out() -> None:
    made = Matrix.empty(SIZES, cluster(1, 8))
    assert made.findings(1.25) == []
    whole = matrix(cluster(1, 8))
    slow_transfer(whole, 0, 1, 4.0)
    half: NDArray[np.float64] = whole.seconds
    half[:, 4:, :] = half[:, :, 4:] = np.nan
    assert short(whole.findings(1.25)) == [("link", "bandwidth", (0, 1), "send")]
    assert {row.group for row in whole.rows()} == {f"{a}>{b}" for a in range(4) for b in range(4) if a != b}


def test_a_shorter_time_replaces_a_longer_one() -> None:
    made = Matrix.empty(SIZES, cluster(1, 2))
    made.put(0, 1, [3e-6, 1e-3])
    made.put(0, 1, [4e-6, 5e-4])
    assert made.seconds[:, 0, 1].tolist() == [3e-6, 5e-4]


def test_suspects_are_the_pairs_that_findings_rest_on() -> None:
    made = matrix(cluster(1, 4))
    slow_transfer(made, 3, 1, 4.0)
    assert made.suspects(made.findings(1.25)) == [(1, 3)]
    made = matrix(cluster(1, 4))
    slow_transfer(made, 2, slice(None), 4.0)
    assert made.suspects(made.findings(1.25)) == [(0, 2), (1, 2), (2, 3)]


def test_links_can_be_fitted() -> None:
    made = Matrix.empty([8, 1024, 1 << 16, 1 << 20], cluster(2, 1))
    made.put(0, 1, [10e-6 + size / 1e9 for size in made.sizes])
    made.put(1, 0, [20e-6 + size / 5e8 for size in made.sizes])
    assert [(each.group, round(each.alpha_us, 2), round(each.busbw_gbs or 0, 3)) for each in fit(made.rows())] == [
        ("0>1", 10.0, 1.0),
        ("1>0", 20.0, 0.5),
    ]


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8, 33])
def test_a_tournament(count: int) -> None:
    """Everybody meets everybody once, and nobody is in two pairs of one round."""
    schedule = rounds(count)
    met = [pair for pairs in schedule for pair in pairs]
    assert sorted(met) == [(one, other) for one in range(count) for other in range(one + 1, count)]
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in schedule)
    assert len(schedule) == count - 1 + count % 2
