"""Which part of each whole parameter this rank holds: what tensor and expert parallelism have cut, and FSDP2 has sharded.

A model states how a parameter is cut as data (a split, as in pretrain/model/split.py). What was cut is written down on the
modules themselves, by the parameters' names: sharding replaces parameter objects, and wrappers change the names above a
module, but the module stays. From that, any tensor of a parameter's shape (the parameter, its gradient, its optimizer
state) is a set of boxes of the whole one.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from parallel.mesh import Mesh


class Split(Protocol):
    """How a parameter is cut along one dim, over the ranks of a mesh axis (see pretrain/model/split.py)."""

    @property
    def dim(self) -> int: ...

    @property
    def axis(self) -> str: ...

    def pieces(self, rank: int, ranks: int) -> list[Any]: ...

    def take(self, whole: Tensor, rank: int, ranks: int) -> Tensor: ...

    def whole(self) -> int: ...

    def obstacle(self, ranks: int) -> str | None: ...


class Cut(NamedTuple):
    """This rank's parameter is part `rank` of `ranks`, cut as the split says."""

    split: Split
    rank: int
    ranks: int

    @property
    def axis(self) -> str:
        return self.split.axis


Cuts = tuple[Cut, ...]


class Box(NamedTuple):
    """A block of a whole tensor that this rank holds: offsets in its own tensor and in the whole one, and the block's sizes.

    copies: how many ranks of the axes that cut the tensor hold the block.
    """

    local: tuple[int, ...]
    whole: tuple[int, ...]
    sizes: tuple[int, ...]
    copies: int

    def times(self, other: Box) -> Box:
        """The box with the dims of both."""
        local, whole, sizes = self.local + other.local, self.whole + other.whole, self.sizes + other.sizes
        return Box(local, whole, sizes, self.copies * other.copies)

    def of(self, tensor: Tensor) -> Tensor:
        """The block of this rank's own tensor, as a view."""
        return _block(tensor, self.local, self.sizes)

    def of_whole(self, tensor: Tensor) -> Tensor:
        """The block of the whole tensor, as a view."""
        return _block(tensor, self.whole, self.sizes)


_RECORD = "parameters_cut"

# What wrappers add to names: torch.compile, activation checkpointing, and the holder of a rank's pipeline stages.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_stage_\d+)\.")


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers have put into it."""
    return _WRAPPERS.sub("", name)


def record(module: nn.Module, splits: Mapping[str, Iterable[Split]], mesh: Mesh) -> None:
    """Writes down that the module's parameters of these names have been cut so, over the splits' axes of the mesh."""
    for name, each in splits.items():
        cuts = tuple(Cut(split, mesh.rank(split.axis), mesh.size(split.axis)) for split in each)
        assert len({cut.split.dim for cut in cuts}) == len(cuts), f"{name} is cut twice along one dim"
        owner, _, own = name.rpartition(".")
        table: dict[str, Cuts] = module.get_submodule(owner).__dict__.setdefault(_RECORD, {})
        table[own] = tuple(cut for cut in cuts if cut.ranks > 1)


def cuts(model: nn.Module) -> dict[str, Cuts]:
    """Every parameter that has been cut, by its plain name."""
    found = {}
    for prefix, module in model.named_modules():
        for name, each in module.__dict__.get(_RECORD, {}).items():
            if each:
                found[plain_name(f"{prefix}.{name}" if prefix else name)] = each
    return found


def local(tensor: Tensor) -> Tensor:
    """What this rank itself holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_shape(tensor: Tensor, cuts: Cuts) -> tuple[int, ...]:
    """The shape of the whole tensor of which `tensor`, plain or sharded by FSDP2, is a part."""
    shape = list(tensor.shape)
    for cut in cuts:
        shape[cut.split.dim] = cut.split.whole()
    return tuple(shape)


def boxes(tensor: Tensor, cuts: Cuts) -> list[Box]:
    """The blocks of the whole tensor that `local(tensor)` consists of."""
    starts, sizes = _shard(tensor)
    along: list[list[Box]] = []  # of each dim: its pieces, as boxes of one dim
    for dim, (start, size) in enumerate(zip(starts, sizes)):
        cut = next((cut for cut in cuts if cut.split.dim == dim), None)
        pieces = [(0, 0, tensor.shape[dim], 1)] if cut is None else cut.split.pieces(cut.rank, cut.ranks)
        held = []
        for begin, whole, length, copies in pieces:
            low, high = max(begin, start), min(begin + length, start + size)
            if low < high:
                held.append(Box((low - start,), (whole + low - begin,), (high - low,), copies))
        along.append(held)
    return [functools.reduce(Box.times, pieces, Box((), (), (), 1)) for pieces in itertools.product(*along)]


def _shard(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offsets, sizes) of this rank's shard in the tensor."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim(), tuple(tensor.shape)
    (chunk,) = tensor.__create_chunk_list__()
    return tuple(chunk.offsets), tuple(chunk.sizes)


def _block(tensor: Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, sizes)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor
