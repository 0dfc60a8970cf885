"""Which of their tensors hold ours, and in which arrangement.

An arrangement cuts, joins, reshapes or turns tensors and never computes with them, so both ways are exact and a round trip
gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Arrange = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Group:
    """Some of our tensors and those of theirs that hold the same numbers.

    out: ours -> theirs, back: theirs -> ours, each in the order of the names. others: further ways in which a folder may hold
    them, with the same `ours`; they are read, never written. wide: stays fp32 when an export asks for bf16.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    out: Arrange
    back: Arrange
    others: tuple[Group, ...] = ()
    wide: bool = False


@dataclass(frozen=True)
class Absent:
    """A tensor of ours that the format does not have.

    value: what it holds after an import. because: an export is refused, with this reason, when it holds anything else; "" for
    what only training needs.
    """

    ours: str
    value: float = 0.0
    because: str = ""


def same(ours: str, *theirs: str, wide: bool = False) -> Group:
    """One tensor under another name. Further names are read as well."""

    def keep(tensors: list[Tensor]) -> list[Tensor]:
        return tensors

    others = tuple(Group((ours,), (name,), keep, keep) for name in theirs[1:])
    return Group((ours,), theirs[:1], keep, keep, others, wide)


def shaped(
    ours: str, theirs: str, out: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], *, wide: bool = False
) -> Group:
    """One tensor, in another shape or order."""
    return Group((ours,), (theirs,), lambda t: [out(t[0])], lambda t: [back(t[0])], wide=wide)


def rows(ours: str, theirs: Sequence[str], sizes: Sequence[int]) -> Group:
    """One tensor of ours whose rows they keep in several. Joined again whatever the sizes there."""
    return Group((ours,), tuple(theirs), lambda t: list(t[0].split(list(sizes))), lambda t: [torch.cat(t)])


def taps(ours: str, theirs: str, parts: Sequence[str] = (), sizes: Sequence[int] = ()) -> Group:
    """A depthwise kernel, ours [C, W], theirs [C, 1, W] as torch's Conv1d has it. parts: written as several, read as either."""
    whole = shaped(ours, theirs, lambda w: w[:, None], lambda w: w[:, 0])
    if not parts:
        return whole

    def out(tensors: list[Tensor]) -> list[Tensor]:
        return list(tensors[0][:, None].split(list(sizes)))

    return Group((ours,), tuple(parts), out, lambda t: [torch.cat(t)[:, 0]], (whole,))


def gate_up(ours: str, stem: str, gate: str, up: str, experts: int) -> Group:
    """Experts' first layers, ours [E, D, 2F] with the gate's columns first; theirs a gate [F, D] and an up [F, D] each.

    stem: "...experts"; also read as one stacked `stem.gate_up_proj` [E, 2F, D].
    """

    def out(tensors: list[Tensor]) -> list[Tensor]:
        return [half for expert in tensors[0].transpose(1, 2) for half in expert.chunk(2)]

    def back(tensors: list[Tensor]) -> list[Tensor]:
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        return [torch.stack([torch.cat(pair).T for pair in pairs])]

    names = tuple(f"{stem}.{e}.{part}.weight" for e in range(experts) for part in (gate, up))
    return Group((ours,), names, out, back, (turned(ours, f"{stem}.gate_up_proj"),))


def down(ours: str, stem: str, name: str, experts: int) -> Group:
    """Experts' second layers, ours [E, F, D]; theirs [D, F] each, also read as one stacked `stem.down_proj` [E, D, F]."""
    names = tuple(f"{stem}.{e}.{name}.weight" for e in range(experts))

    def out(tensors: list[Tensor]) -> list[Tensor]:
        return list(tensors[0].transpose(1, 2))

    def back(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.stack([t.T for t in tensors])]

    return Group((ours,), names, out, back, (turned(ours, f"{stem}.down_proj"),))


def turned(ours: str, theirs: str) -> Group:
    """[E, A, B] here, [E, B, A] there."""
    return shaped(ours, theirs, lambda w: w.transpose(1, 2), lambda w: w.transpose(1, 2))
