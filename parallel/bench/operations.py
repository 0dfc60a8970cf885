"""The collectives: what each moves, by which definition its bandwidth counts, and the call that is timed.

S, the size of a row, is nccl-tests': the whole buffer of the group's collective. For all_reduce, broadcast, reduce and
send_recv that is the tensor; for all_gather, reduce_scatter and all_to_all it is the n shards together. algbw = S /
time, busbw = algbw * factor (parallel/fabric/topology.py). count is what nccl-tests prints: elements of the tensor, or
of one shard.

torch reduces and broadcasts in place only. Their out-of-place form is a copy into the output and then the collective,
as a caller has to write it, and the copy is timed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from parallel.bench.groups import Team

REDOPS = {
    "sum": dist.ReduceOp.SUM,
    "prod": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "avg": dist.ReduceOp.AVG,
}
REDUCED = -1  # in Piece.source: the reduction of all ranks' tables


class Piece(NamedTuple):
    """A part of a buffer that holds elements offset, offset + 1, ... of a table: that of the rank `source` of the
    group, or REDUCED.
    """

    tensor: Tensor
    source: int
    offset: int = 0


class Need(NamedTuple):
    """Elements of the two buffers on this rank."""

    send: int
    receive: int


@dataclass
class Work:
    """One collective on buffers of its own, ready to be called.

    inputs: to be filled before a checked call. outputs: what it leaves.
    """

    call: Callable[[], object]
    inputs: list[Piece] = field(default_factory=list)
    outputs: list[Piece] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """What a collective is prepared for. count: elements of S, over all shards. root: a place in the group."""

    team: Team
    count: int
    in_place: bool
    redop: str = "sum"
    root: int = 0
    imbalance: float = 4.0
    own_stream: bool = False  # asynchronous calls run on the process group's own stream (GPUs)

    def calling(self, function: Callable[..., Any], *args: Any, **options: Any) -> Callable[[], object]:
        options["group"] = self.team.group
        if self.own_stream:
            return lambda: function(*args, async_op=True, **options).wait()
        return lambda: function(*args, **options)


@dataclass(frozen=True)
class Operation:
    """definition: the op of parallel/fabric whose busbw factor counts. shards: whether S is cut into one shard a rank.

    native: whether torch's own form is in place; places: which forms there are (in place: True). share: how much of a call
    one message is (half of a there-and-back).
    """

    name: str
    says: str
    need: Callable[[Case], Need]
    prepare: Callable[[Case, Tensor, Tensor], Work]
    definition: str = ""
    aliases: tuple[str, ...] = ()
    shards: bool = False
    reduces: bool = False
    rooted: bool = False
    native: bool = False
    places: tuple[bool, ...] = (False, True)
    least_ranks: int = 1
    share: float = 1.0

    @property
    def moves(self) -> bool:
        """False for the barrier, which has no size."""
        return self.name != "barrier"

    def elements(self, size: int, ranks: int, itemsize: int) -> int:
        """Elements of S nearest below `size` bytes, at least one a shard."""
        unit = ranks if self.shards else 1
        return max(1, size // itemsize // unit) * unit


# The names that torch 2.13 gave these; the old ones warn there.
def _gather_call() -> Callable[..., Any]:
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _scatter_call() -> Callable[..., Any]:
    return getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _copied(copy: Callable[[], object], call: Callable[[], object]) -> Callable[[], object]:
    def both() -> None:
        copy()
        call()

    return both


def _all_reduce(case: Case, send: Tensor, receive: Tensor) -> Work:
    x = send if case.in_place else receive
    call = case.calling(dist.all_reduce, x, op=REDOPS[case.redop])
    if not case.in_place:
        call = _copied(lambda: receive.copy_(send), call)
    return Work(call, [Piece(send, case.team.place)], [Piece(x, REDUCED)])


def _reduce(case: Case, send: Tensor, receive: Tensor) -> Work:
    x = send if case.in_place else receive
    call = case.calling(dist.reduce, x, dst=case.team.ranks[case.root], op=REDOPS[case.redop])
    if not case.in_place:
        call = _copied(lambda: receive.copy_(send), call)
    # What the others are left with is not defined.
    outputs = [Piece(x, REDUCED)] if case.team.place == case.root else []
    return Work(call, [Piece(send, case.team.place)], outputs)


def _broadcast(case: Case, send: Tensor, receive: Tensor) -> Work:
    x = send if case.in_place else receive
    call = case.calling(dist.broadcast, x, src=case.team.ranks[case.root])
    if not case.in_place and case.team.place == case.root:
        call = _copied(lambda: receive.copy_(send), call)
    return Work(call, [Piece(send, case.team.place)], [Piece(x, case.root)])


def _all_gather(case: Case, send: Tensor, receive: Tensor) -> Work:
    ranks, place = case.team.size, case.team.place
    shards = receive.chunk(ranks)
    shard = shards[place] if case.in_place else send
    call = case.calling(_gather_call(), receive, shard)
    return Work(call, [Piece(shard, place)], [Piece(part, rank) for rank, part in enumerate(shards)])


def _reduce_scatter(case: Case, send: Tensor, receive: Tensor) -> Work:
    ranks, place = case.team.size, case.team.place
    shard = send.chunk(ranks)[place] if case.in_place else receive
    call = case.calling(_scatter_call(), shard, send, op=REDOPS[case.redop])
    return Work(call, [Piece(send, place)], [Piece(shard, REDUCED, place * shard.numel())])


def _all_to_all(case: Case, send: Tensor, receive: Tensor) -> Work:
    ranks, place = case.team.size, case.team.place
    parts = receive.chunk(ranks)
    call = case.calling(dist.all_to_all_single, receive, send)
    outputs = [Piece(part, rank, place * part.numel()) for rank, part in enumerate(parts)]
    return Work(call, [Piece(send, place)], outputs)


def splits(count: int, ranks: int, imbalance: float) -> list[int]:
    """Elements that every rank sends to each: from rank 0, which gets least, evenly up to `imbalance` times as much.

    All ranks send `count`, so that, over all ranks, as many bytes cross the wire as in the even case, and busbw
    compares with it; but the last rank receives most, as the rank of the busiest experts does, and the others wait for
    it.
    """
    weights = [1 + (imbalance - 1) * rank / max(1, ranks - 1) for rank in range(ranks)]
    ends = [round(count * sum(weights[: rank + 1]) / sum(weights)) for rank in range(ranks)]
    return [end - start for start, end in zip([0, *ends], ends)]


def _uneven(case: Case, send: Tensor, receive: Tensor) -> Work:
    ranks, place = case.team.size, case.team.place
    sent = splits(case.count, ranks, case.imbalance)
    call = case.calling(
        dist.all_to_all_single, receive, send, output_split_sizes=[sent[place]] * ranks, input_split_sizes=sent
    )
    parts = receive.split(sent[place]) if sent[place] else ()
    outputs = [Piece(part, rank, sum(sent[:place])) for rank, part in enumerate(parts)]
    return Work(call, [Piece(send, place)], outputs)


def _ring(case: Case, send: Tensor, receive: Tensor) -> Work:
    ranks, place, group = case.team.ranks, case.team.place, case.team.group
    after, before = ranks[(place + 1) % len(ranks)], ranks[place - 1]

    def call() -> None:
        # Both at once, or a ring of ranks that send first would wait for each other.
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, send, after, group), dist.P2POp(dist.irecv, receive, before, group)]
        )
        for work in works:
            work.wait()

    return Work(call, [Piece(send, place)], [Piece(receive, (place - 1) % len(ranks))])


def _pairs(case: Case, send: Tensor, receive: Tensor) -> Work:
    ranks, place, group = case.team.ranks, case.team.place, case.team.group
    partner = place ^ 1
    if partner >= len(ranks):  # the last of an odd number
        return Work(lambda: None)
    other = ranks[partner]

    def lead() -> None:
        dist.send(send, other, group=group)
        dist.recv(receive, other, group=group)

    def follow() -> None:
        dist.recv(receive, other, group=group)
        dist.send(send, other, group=group)

    return Work(lead if place < partner else follow, [Piece(send, place)], [Piece(receive, partner)])


def _barrier(case: Case, send: Tensor, receive: Tensor) -> Work:
    return Work(lambda: dist.barrier(group=case.team.group))


def _whole(case: Case) -> Need:
    return Need(case.count, 0 if case.in_place else case.count)


def _both(case: Case) -> Need:
    return Need(case.count, case.count)


def _received(case: Case) -> Need:
    return Need(case.count, splits(case.count, case.team.size, case.imbalance)[case.team.place] * case.team.size)


_ALL = (
    Operation(
        "all_reduce", "every rank gets the sum", _whole, _all_reduce, aliases=("allreduce",), reduces=True, native=True
    ),
    Operation(
        "reduce_scatter",
        "every rank gets its shard of the sum",
        lambda case: Need(case.count, 0 if case.in_place else case.count // case.team.size),
        _reduce_scatter,
        aliases=("reducescatter",),
        shards=True,
        reduces=True,
    ),
    Operation(
        "all_gather",
        "every rank gets all shards",
        lambda case: Need(0 if case.in_place else case.count // case.team.size, case.count),
        _all_gather,
        aliases=("allgather",),
        shards=True,
    ),
    Operation("broadcast", "every rank gets the root's tensor", _whole, _broadcast, rooted=True, native=True),
    Operation(
        "all_to_all",
        "every rank sends each a shard of its own",
        _both,
        _all_to_all,
        aliases=("alltoall",),
        shards=True,
        places=(False,),
    ),
    Operation(
        "all_to_all_uneven",
        "the same with shards of different sizes (--imbalance)",
        _received,
        _uneven,
        definition="all_to_all",
        aliases=("all_to_all_v", "alltoallv", "alltoall_uneven"),
        shards=True,
        places=(False,),
    ),
    Operation("reduce", "the root gets the sum", _whole, _reduce, reduces=True, rooted=True, native=True),
    Operation(
        "send_recv",
        "every rank sends to the next and receives from the one before: a ring",
        _both,
        _ring,
        aliases=("sendrecv", "send_recv_ring", "ring"),
        places=(False,),
        least_ranks=2,
    ),
    Operation(
        "send_recv_pairs",
        "neighbours 0-1, 2-3, ... there and back; the time of one way",
        _both,
        _pairs,
        definition="send_recv",
        aliases=("sendrecv_pairs", "pairwise", "ping_pong"),
        places=(False,),
        least_ranks=2,
        share=0.5,
    ),
    Operation("barrier", "every rank waits for all", lambda case: Need(0, 0), _barrier, places=(False,)),
)
OPERATIONS = {operation.name: operation for operation in _ALL}


def chosen(names: Sequence[str]) -> list[Operation]:
    """Operations by name or alias, each once; `all` stands for all of them. Raises ValueError that names the nearest
    valid one.
    """
    by_name = {name: operation for operation in _ALL for name in (operation.name, *operation.aliases)}
    found: dict[str, Operation] = {}
    for name in (part for word in names for part in word.split(",")):
        plain = name.lower().replace("-", "_")
        if plain == "all":
            found |= OPERATIONS
        elif plain in by_name:
            found.setdefault(by_name[plain].name, by_name[plain])
        else:
            near = difflib.get_close_matches(plain, list(by_name), n=1, cutoff=0.5)
            hint = f"did you mean {by_name[near[0]].name!r}? " if near else ""
            raise ValueError(f"no operation {name!r}; {hint}choose among {', '.join(OPERATIONS)}, or all")
    return list(found.values())
