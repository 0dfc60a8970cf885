"""Faults in context parallelism: a packed row over two ranks, in four chunks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.parallel.mutations import mutation, replaced, wrapped

Patch = AbstractContextManager[Any]
SEQUENCE = "parallel.context.sequence.CutSequence"


@mutation("cp=2", "rotary positions count from the rank's own first token")
def positions_of_the_rank(rank: int) -> Patch:
    def own(cut: Any) -> Tensor:
        lengths = cut.local().diff().long()
        starts = cut.local()[:-1].long().repeat_interleave(lengths)
        return torch.arange(int(lengths.sum())) - starts

    return replaced("parallel.context.cut.Cut.positions", own)


@mutation("cp=2", "convolutions begin every chunk with zeros")
def no_halo(rank: int) -> Patch:
    return replaced(
        f"{SEQUENCE}.convolve", lambda sequence, *args, **options: sequence.plain.convolve(*args, **options)
    )


@mutation("cp=2", "convolutions take the last columns of the chunk itself for those of the chunk before")
def halo_of_another_chunk(rank: int) -> Patch:
    return wrapped(f"{SEQUENCE}.convolve", _of_the_next_chunk)


def _of_the_next_chunk(call: Any) -> Any:
    """The same method of a sequence whose columns before a chunk are those that this chunk ends with."""

    def wrong(sequence: Any, *args: Any, **options: Any) -> Any:
        place = type(sequence.cut).place
        with mock.patch.object(type(sequence.cut), "place", lambda cut, chunk: place(cut, chunk + 1)):
            return call(sequence, *args, **options)

    return wrong


@mutation("cp=2", "operators that look back find nothing before a chunk", "compressed")
def nothing_to_look_back_at(rank: int) -> Patch:
    return replaced(
        f"{SEQUENCE}.look_back", lambda sequence, *args, **options: sequence.plain.look_back(*args, **options)
    )


@mutation(
    "cp=2",
    "operators that look back see the last columns of the chunk itself for those of the chunk before",
    "compressed",
)
def looking_back_at_another_chunk(rank: int) -> Patch:
    return wrapped(f"{SEQUENCE}.look_back", _of_the_next_chunk)


@mutation("cp=2", "recurrences begin every chunk with an empty state")
def states_not_passed_on(rank: int) -> Patch:
    return replaced(f"{SEQUENCE}.recur", lambda sequence, *args, **options: sequence.plain.recur(*args, **options))


def _without_transition(operator: str) -> Patch:
    from parallel.context.recurrences import LAWS

    (law,) = (law for law in LAWS if law.__name__ == operator)
    plain = LAWS[law]._replace(advance=lambda state, summary, inputs: state + summary[0])
    return mock.patch.dict(LAWS, {law: plain})


@mutation("cp=2", "delta rule: states of chunks are added without the transition matrix of what lies between")
def delta_states_added(rank: int) -> Patch:
    return _without_transition("delta_rule")


@mutation("cp=2", "gated linear attention: states of chunks are added without the decay of what lies between")
def additive_states_not_decayed(rank: int) -> Patch:
    return _without_transition("gated_linear_attention")


@mutation("cp=2,context=ring", "attention leaves out the keys of the last rank that come by")
def ring_ends_early(rank: int) -> Patch:
    def wrap(tiles: Any) -> Any:
        def fewer(cut: Any, source: int, *args: Any) -> Any:
            return iter(()) if source == (cut.rank + 1) % cut.ranks else tiles(cut, source, *args)

        return fewer

    return wrapped("parallel.context.ring.tiles", wrap)


@mutation("cp=2,context=ring", "gradients of keys and values are passed on once too often")
def ring_gradients_go_to_the_neighbour(rank: int) -> Patch:
    from parallel.context.ring import _Passing

    def wrap(backward: Any) -> Any:
        def one_pass_too_many(ctx: Any, grad: Tensor) -> Any:
            dq, dk, dv, *rest = backward(ctx, grad)
            strayed = _Passing(torch.cat((dk, dv), dim=-1), ctx.settings[3]).received()
            return dq, strayed[..., : dk.shape[-1]], strayed[..., dk.shape[-1] :], *rest

        return staticmethod(one_pass_too_many)

    return wrapped("parallel.context.ring._RingAttention.backward", wrap)


@mutation("cp=2", "each rank takes its two chunks for neighbours, but has the first and the last, or the middle ones")
def zigzag_order_wrong(rank: int) -> Patch:
    chunks = property(lambda cut: (2 * cut.rank, 2 * cut.rank + 1))
    return replaced("parallel.context.cut.Cut.chunks", chunks)


@mutation("cp=2", "tokens are shared out as neighbours, but counted in zig-zag order")
def shards_are_neighbours(rank: int) -> Patch:
    return replaced("parallel.context.cut.shard", lambda row, ranks, rank, dim=1: row.chunk(ranks, dim)[rank])


@mutation("cp=2", "documents run into each other at the borders of the row's chunks")
def borders_of_documents_ignored(rank: int) -> Patch:
    def wrap(of: Any) -> Any:
        return staticmethod(lambda ranks, rank, length, cu_seqlens: of(ranks, rank, length, None))

    return wrapped("parallel.context.cut.Cut.of", wrap)


@mutation("cp=2", "gradients of keys, halos and states that other ranks used are not brought back")
def gradients_of_what_was_gathered_dropped(rank: int) -> Patch:
    def backward(ctx: Any, dkept: Tensor, dgathered: Tensor) -> Any:
        import torch.distributed as dist

        return dkept, dgathered.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None

    return replaced("parallel.collectives._Beside.backward", staticmethod(backward))


@mutation("cp=2", "balancing within a sequence counts the rank's tokens only")
def sequence_loads_of_the_rank(rank: int) -> Patch:
    return replaced(f"{SEQUENCE}.total", lambda sequence, counts: counts)
