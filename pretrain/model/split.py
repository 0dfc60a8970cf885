"""How the parameters of a sublayer are cut into parts that compute side by side, as plain data.

A split sublayer is a sum: with the parameters cut as its `splits()` say, the parts' outputs for the same input add up to the
whole one's output. A parameter is cut along one dim. That dim may hold several things end to end (queries, keys, values): its
sections, each cut by itself, and a part's parameter is what it gets of each, end to end again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

MOST = 64  # sizes above are not listed in messages


class Piece(NamedTuple):
    """A run of entries along the split dim: at `local` in the part, at `start` in the whole; `copies` parts hold it."""

    local: int
    start: int
    length: int
    copies: int = 1


@dataclass(frozen=True)
class Section:
    """A stretch of `length` entries that consists of `count` equal units, such as heads, which are never cut.

    field: the setting that fixes the count, for messages. shared: more parts than units are fine, neighbouring parts then hold
    copies of one unit (key heads that serve several parts' query heads).
    """

    length: int
    count: int
    field: str
    shared: bool = False

    def fits(self, ranks: int) -> bool:
        """Whether it can be cut into `ranks` parts."""
        return self.count % ranks == 0 or (self.shared and ranks % self.count == 0)

    def of(self, length: int) -> Section:
        """As many units, of another length in all."""
        return replace(self, length=length)

    @classmethod
    def even(cls, length: int, field: str) -> Section:
        """A stretch that may be cut between any two entries."""
        return cls(length, length, field)


@dataclass(frozen=True)
class Split:
    """How one parameter is cut: along `dim`, whose sections lie end to end. axis: over which ranks of the mesh."""

    dim: int
    sections: tuple[Section, ...]
    axis: Literal["tp", "ep"] = "tp"

    def pieces(self, rank: int, ranks: int) -> list[Piece]:
        """What part `rank` of `ranks` holds. Raises ValueError when a section cannot be cut so."""
        check_fit([self], ranks)
        found, local, start = [], 0, 0
        for section in self.sections:
            unit = section.length // section.count
            own = max(1, section.count // ranks)
            first = rank * section.count // ranks
            found.append(Piece(local, start + first * unit, own * unit, max(1, ranks // section.count)))
            local += own * unit
            start += section.length
        return found

    def take(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """Part `rank` of a tensor of the parameter's whole shape, as a copy."""
        pieces = self.pieces(rank, ranks)
        return torch.cat([whole.narrow(self.dim, piece.start, piece.length) for piece in pieces], dim=self.dim)

    def obstacle(self, ranks: int) -> str | None:
        """The setting that does not allow `ranks` parts, as `heads=3`; None if all do."""
        return next((f"{s.field}={s.count}" for s in self.sections if not s.fits(ranks)), None)

    def whole(self) -> int:
        """Entries of the whole parameter along the split dim."""
        return sum(section.length for section in self.sections)


class SharedBias(nn.Linear):
    """The output projection of one of `ranks` parts: each adds an equal share of the bias, so that their sum has it once."""

    def __init__(self, linear: nn.Linear, ranks: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, None if self.bias is None else self.bias / self.ranks)


def rows(linear: nn.Linear, name: str, *sections: Section) -> dict[str, Split]:
    """A projection cut by its outputs; `sections` describe them."""
    split = Split(0, sections)
    return {f"{name}.weight": split} if linear.bias is None else {f"{name}.weight": split, f"{name}.bias": split}


def columns(name: str, *sections: Section) -> dict[str, Split]:
    """A projection cut by its inputs; `sections` describe them. Its bias, if any, stays whole (see SharedBias)."""
    return {f"{name}.weight": Split(1, sections)}


def check_fit(splits: Collection[Split], ranks: int) -> None:
    """Raises ValueError, naming the setting and the numbers of parts that would do, unless all splits make `ranks` parts."""
    for split in splits:
        obstacle = split.obstacle(ranks)
        if obstacle is not None:
            valid = (str(n) for n in range(1, MOST + 1) if all(other.obstacle(n) is None for other in splits))
            raise ValueError(f"{obstacle} cannot be cut into {ranks} parts; possible here: {', '.join(valid)}")
