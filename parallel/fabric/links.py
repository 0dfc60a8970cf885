"""Who is slow: every link between two ranks beside its like, every rank beside the others. Plain arithmetic on measured times.

A link is compared with links of its kind only (inside a node, along a rail, across rails). What is typical is told by the
faster ones: one slow rank of four already spoils half of all links.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from parallel.fabric.fit import Row

MOST = 0.75  # of a rank's links slow: then the rank is what they have in common
SCATTER = (
    6.0  # a link stands out if it is slower by this many standard deviations of the logarithm, about, by the fast ones
)
_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Place:
    """Where a rank is: its node (counted from 0), the node's host name, its number in the node."""

    rank: int
    host: str
    node: int
    local: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, local {self.local})"


def relation(one: Place, other: Place) -> str:
    """The kind of a link. Ranks of one number in their nodes share a rail."""
    if one.node == other.node:
        return "inside a node"
    return "along a rail" if one.local == other.local else "across rails"


@dataclass(frozen=True)
class Finding:
    """Something that is slower than its like."""

    kind: Literal["node", "rank", "link"]
    what: Literal["compute", "latency", "bandwidth"]
    ranks: tuple[int, ...]
    """The ranks of a slow node, the one slow rank, or sender and receiver of a slow link."""
    direction: Literal["both", "send", "receive"]
    """Of a link: both, or send for this direction only. Of a rank: sending, receiving or both."""
    relation: str
    """The kind of links it was compared with; empty for compute."""
    ratio: float
    """How many times the time of its like it takes (a rank's median link)."""
    slow: int
    """How many of the links in question are slow, ..."""
    links: int
    """... of how many."""

    def text(self, places: Sequence[Place]) -> str:
        """One line for people."""
        how = {"compute": "computes", "latency": "has latencies", "bandwidth": "moves data"}[self.what]
        times = f"{self.ratio:.2g} times " + ("as long" if self.what == "latency" else "slower than its like")
        if self.what == "compute":
            return (
                f"slow rank: {places[self.ranks[0]]} computes {self.ratio:.2g} times as long as the others for the same"
            )
        if self.kind == "link":
            one, other = (places[rank] for rank in self.ranks)
            arrow = "<->" if self.direction == "both" else "->"
            figure = "latency" if self.what == "latency" else "time for the same bytes"
            return f"slow link: {one} {arrow} {other}: {self.ratio:.2g} times the {figure} of others {self.relation}"
        ways = {"both": "", "send": " when it sends", "receive": " when it receives"}[self.direction]
        who = (
            f"slow node: {places[self.ranks[0]].host}" if self.kind == "node" else f"slow rank: {places[self.ranks[0]]}"
        )
        return f"{who} {how} {times}{ways}, {self.relation} ({self.slow} of {self.links} links slow)"


@dataclass
class Matrix:
    """Times of messages between all pairs of ranks.

    seconds: [len(sizes), N, N], one way from row to column, NaN where nothing was measured. sizes ascend; the first is small
    enough to show latency only. compute: [N] seconds for the same piece of work on each rank, NaN where not measured.
    """

    sizes: list[int]
    places: list[Place]
    seconds: _Floats
    compute: _Floats = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def empty(cls, sizes: Sequence[int], places: Sequence[Place]) -> Matrix:
        count = len(places)
        return cls(list(sizes), list(places), np.full((len(sizes), count, count), np.nan), np.full(count, np.nan))

    def put(self, sender: int, receiver: int, seconds: Sequence[float]) -> None:
        """Enters a link's times; the shorter ones where there are some already, for noise only ever adds to a time."""
        slot = self.seconds[:, sender, receiver]
        self.seconds[:, sender, receiver] = np.fmin(slot, np.asarray(seconds))

    @property
    def latency(self) -> _Floats:
        """Seconds, [N, N]: the same both ways, for half of a journey there and back knows no direction."""
        return np.fmin(self.seconds[0], self.seconds[0].T)

    @property
    def transfer(self) -> _Floats:
        """Seconds that the largest message takes beyond the smallest, [N, N]: what bandwidth decides. At least half of its
        time: where it is mostly latency, their difference is noise."""
        return np.maximum(self.seconds[-1] - self.seconds[0], self.seconds[-1] / 2)

    @property
    def bandwidth(self) -> _Floats:
        """GB/s (1e9 bytes), [N, N]; NaN where the largest message takes no longer than the smallest."""
        beyond = self.seconds[-1] - self.seconds[0]
        return 1e-9 * (self.sizes[-1] - self.sizes[0]) / np.where(beyond > 0, beyond, np.nan)

    def rows(self) -> list[Row]:
        """Every link as rows to fit: op send_recv, group "sender>receiver"."""
        found = []
        for sender, receiver in zip(*np.nonzero(~np.isnan(self.latency))):
            times = self.seconds[:, sender, receiver]
            found += [
                Row("send_recv", f"{sender}>{receiver}", 2, size, float(t))
                for size, t in zip(self.sizes, times)
                if not np.isnan(t)
            ]
        return found

    def findings(self, tolerance: float) -> list[Finding]:
        """What is slow: compute first, then by how much.

        tolerance: from how many times the time of its like a link counts as slow; latencies from twice that, for they scatter
        more. Where the fast links themselves scatter, from further off.
        """
        found = _slow_ranks_by_compute(self.compute, tolerance)
        found += judge(self.latency, self.places, "latency", 2 * tolerance)
        if len(self.sizes) > 1:
            found += judge(self.transfer, self.places, "bandwidth", tolerance)
        return sorted(found, key=lambda each: (each.what != "compute", -each.ratio))

    def scatters(self, tolerance: float) -> bool:
        """Whether the fast links differ so much among themselves that less than the tolerance lets on is found."""
        times = [(self.latency, 2 * tolerance)] + [(self.transfer, tolerance)] * (len(self.sizes) > 1)
        return any(limit > least for table, least in times for *_, limit in _kinds(table, self.places, least))

    def suspects(self, findings: Iterable[Finding]) -> list[tuple[int, int]]:
        """The pairs of ranks (lower one first) on which the findings about links and ranks rest."""
        pairs: set[tuple[int, int]] = set()
        for finding in findings:
            if finding.what == "compute":
                continue
            if finding.kind == "link":
                pairs.add((min(finding.ranks), max(finding.ranks)))
                continue
            for rank in finding.ranks:
                pairs |= {
                    (min(rank, place.rank), max(rank, place.rank))
                    for place in self.places
                    if place.rank != rank and relation(self.places[rank], place) == finding.relation
                }
        return sorted(pairs)


def judge(
    seconds: _Floats, places: Sequence[Place], what: Literal["latency", "bandwidth"], tolerance: float
) -> list[Finding]:
    """Slow nodes, ranks and links by one time per link: [N, N] from row to column, NaN where not measured."""
    found: list[Finding] = []
    for kind, mask, typical, limit in _kinds(seconds, places, tolerance):
        found += _blame(np.where(mask, seconds / typical, np.nan), limit, kind, places, what)
    return found


def _kinds(
    seconds: _Floats, places: Sequence[Place], tolerance: float
) -> Iterator[tuple[str, NDArray[np.bool_], float, float]]:
    """(name, which links, their typical time, from how many times that one is slow) of each kind of links."""
    kinds = np.array([[relation(a, b) if a.rank != b.rank else "" for b in places] for a in places])
    for kind in sorted(set(kinds.ravel().tolist()) - {""}):
        mask = (kinds == kind) & ~np.isnan(seconds)
        if mask.sum() >= 2:
            yield kind, mask, *_limit(seconds[mask], tolerance)


def _limit(times: _Floats, tolerance: float) -> tuple[float, float]:
    """(the typical time, from how many times that a link is slow)."""
    ordered = np.sort(np.log(times))
    # One slow rank of four spoils half of the links, one of three two thirds: what is typical is below both.
    at = int((0.4 if len(ordered) >= 12 else 0.25) * (len(ordered) - 1))
    below = ordered[: at + 1]
    scatter = float((below[-1] - below).mean()) / 0.7  # what a normal distribution has below this point, on average
    return float(np.exp(below[-1])), max(tolerance, float(np.exp(SCATTER * scatter)))


def _blame(
    ratio: _Floats, limit: float, kind: str, places: Sequence[Place], what: Literal["latency", "bandwidth"]
) -> list[Finding]:
    """ratio: [N, N], NaN for links of other kinds. What slow links have in common is blamed first: nodes, then ranks."""
    slow = ratio > limit
    there = ~np.isnan(ratio)
    sends, receives = _mostly(slow.sum(1), there.sum(1)), _mostly(slow.sum(0), there.sum(0))
    typical = np.ones_like(ratio)  # what the ranks at its two ends explain of a link's ratio
    ranks: dict[int, Finding] = {}
    for rank in np.nonzero(sends | receives)[0].tolist():
        direction: Literal["both", "send", "receive"] = (
            "both" if sends[rank] and receives[rank] else "send" if sends[rank] else "receive"
        )
        out = ratio[rank][there[rank]] if sends[rank] else np.zeros(0)
        into = ratio[:, rank][there[:, rank]] if receives[rank] else np.zeros(0)
        own = np.concatenate([out, into])
        middle = float(np.median(own))
        if sends[rank]:
            typical[rank] = np.maximum(typical[rank], middle)
        if receives[rank]:
            typical[:, rank] = np.maximum(typical[:, rank], middle)
        ranks[rank] = Finding("rank", what, (rank,), direction, kind, middle, int((own > limit).sum()), len(own))
    found = _nodes(ranks, places)
    left = slow & (ratio / typical > limit)
    for one, other in zip(*np.nonzero(left)):
        back = bool(left[other, one])
        if back and one > other:
            continue
        worst = float(np.nanmax([ratio[one, other], ratio[other, one]])) if back else float(ratio[one, other])
        direction = "both" if back else "send"
        found.append(Finding("link", what, (int(one), int(other)), direction, kind, worst, 1 + back, 1 + back))
    return found


def _mostly(slow: NDArray[np.int64], links: NDArray[np.int64]) -> NDArray[np.bool_]:
    # With one link only there is nothing to tell a slow rank from a slow link by.
    return (slow >= 2) & (slow >= np.ceil(MOST * links))


def _nodes(ranks: dict[int, Finding], places: Sequence[Place]) -> list[Finding]:
    """Ranks that are slow to other nodes become one finding where they are all ranks of their node."""
    members: dict[int, list[int]] = {}
    for place in places:
        members.setdefault(place.node, []).append(place.rank)
    found = []
    for own in members.values():
        slow = [ranks[rank] for rank in own if rank in ranks]
        outward = slow and slow[0].relation != "inside a node"
        if outward and len(slow) == len(own) > 1 and len({each.direction for each in slow}) == 1:
            ratio = float(np.median([each.ratio for each in slow]))
            counts = sum(each.slow for each in slow), sum(each.links for each in slow)
            first = slow[0]
            found.append(Finding("node", first.what, tuple(own), first.direction, first.relation, ratio, *counts))
        else:
            found += slow
    return found


def _slow_ranks_by_compute(seconds: _Floats, tolerance: float) -> list[Finding]:
    known = np.nonzero(~np.isnan(seconds))[0]
    if len(known) < 2:
        return []
    typical, limit = _limit(seconds[known], tolerance)
    return [
        Finding("rank", "compute", (rank,), "both", "", float(seconds[rank]) / typical, 0, 0)
        for rank in known.tolist()
        if seconds[rank] / typical > limit
    ]


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """A tournament: in every round each of `count` ranks is in at most one pair, and every pair meets once.

    The circle method: one rank stays, the others move on by one place after each round.
    """
    seats = list(range(count)) + ([] if count % 2 == 0 else [-1])
    found = []
    for _ in range(len(seats) - 1):
        pairs = [(seats[i], seats[-1 - i]) for i in range(len(seats) // 2)]
        found.append([(min(pair), max(pair)) for pair in pairs if -1 not in pair])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found
