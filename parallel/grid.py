"""The process grid as arithmetic: where a rank stands and which ranks form each group. No torch, no process, no device.

    rank = ((pp_rank * dp + dp_rank) * cp + cp_rank) * tp + tp_rank,        dp_rank = replicate_rank * shard + shard_rank

so that tensor-parallel ranks, which talk most, are neighbours, and pipeline stages, which talk least, are far apart
(the default order tp-cp-ep-dp-pp of megatron-core's parallel_state). Experts see the same ranks as (pp, edp, ep): an ep
group is a run of neighbours inside a pipeline stage, whatever their dp, cp and tp.

Because ranks are numbers in a mixed radix, every axis is a size and a stride, and every group an arithmetic progression.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pydantic import Field

from parallel.config import Strict, guess

AXES = ("pp", "dp", "replicate", "shard", "cp", "tp", "ep", "edp", "dp_cp", "shard_cp", "dp_cp_tp")
"""pp: stages. dp = replicate x shard: other batches. cp: parts of the same sequences. tp: parts of the same matrices.
ep: other experts. edp: the same experts. dp_cp: other tokens, the same parameters. shard_cp: the part of dp_cp over which
parameters are sharded. dp_cp_tp: the whole pipeline stage."""


class MeshConfig(Strict):
    """Sizes of the mesh axes: pp x dp x cp x tp is the number of ranks. ep lies across the ranks of a pipeline stage."""

    pp: int = Field(1, ge=1)
    """Pipeline ranks: each holds a share of the layers."""
    pp_schedule: Literal["1f1b", "interleaved", "zbv"] = "1f1b"
    """Order of the micro-batches. 1f1b: one stage a rank. interleaved: several, for a smaller bubble and more messages. zbv: two,
    and weight gradients fill the bubble (zero bubble), for more memory."""
    pp_virtual: int | None = Field(None, ge=1)
    """Stages a rank holds; left out: 1 for 1f1b, 2 for the others."""
    pp_layers: list[int] | None = None
    """Layers of each stage, in the model's order; left out, stages are cut so that the dearest is as cheap as it can be."""
    dp: int | None = Field(None, ge=1)
    """Data-parallel ranks; all ranks that the other axes leave when left out."""
    replicate: int = Field(1, ge=1)
    """Copies of the sharded parameters (HSDP): the dp ranks are replicate groups, each of which shards among its own."""
    cp: int = Field(1, ge=1)
    """Context-parallel ranks: each holds a part of every sequence."""
    context: Literal["gather", "ring"] = "gather"
    """How attention reaches keys on other cp ranks. gather: each rank gathers all of them, for the fused kernels. ring: they
    travel from rank to rank, so that a rank never holds more than two ranks' share; slower."""
    tp: int = Field(1, ge=1)
    """Tensor-parallel ranks: each holds a part of every matrix, and of the residual stream between sublayers."""
    ep: int = Field(1, ge=1)
    """Expert-parallel ranks: each holds a part of the experts. Spans tp, then cp, then dp."""
    expert_tensor: bool = False
    """Cut each expert over tp too; ep then spans cp, then dp. Off: an expert lies whole on a rank."""

    def grid(self, world: int | None = None) -> Grid:
        """The grid on `world` ranks; None: on as many as mesh.dp asks for, or on the fewest that the other sizes allow.

        Raises ValueError naming the sizes that do not fit and those that would.
        """
        pp, cp, tp, ep = self.pp, self.cp, self.tp, self.ep
        if self.expert_tensor and tp == 1:
            raise ValueError(
                "mesh.expert_tensor=true cuts every expert over tp, but mesh.tp=1; "
                "set mesh.tp to 2 or more, or leave mesh.expert_tensor out"
            )
        spanned = {"cp": cp} if self.expert_tensor else {"cp": cp, "tp": tp}  # by ep, besides dp
        inner = math.prod(spanned.values())
        dp = self._dp(world) if world is not None else self.dp or math.lcm(self.replicate, ep // math.gcd(ep, inner))
        if dp % self.replicate:
            raise ValueError(
                f"mesh.replicate={self.replicate} does not divide dp={dp}; valid here: {_list(_divisors(dp))}"
            )
        if (dp * inner) % ep:
            reason = "; each expert is cut over tp besides (mesh.expert_tensor)" if self.expert_tensor else ""
            raise ValueError(
                f"mesh.ep={ep} does not divide {_product({'dp': dp, **spanned}, always=True)}, the ranks of a pipeline "
                f"stage that share out the experts{reason}; valid here: {_list(_divisors(dp * inner))}"
            )
        return Grid(pp, self.replicate, dp // self.replicate, cp, tp, ep, self.expert_tensor)

    def _dp(self, world: int) -> int:
        """Data-parallel ranks out of `world`."""
        model = {"pp": self.pp, "cp": self.cp, "tp": self.tp}
        size = math.prod(model.values())
        rest = world // size if world % size == 0 else None
        if self.dp is not None and self.dp != rest:
            sizes = {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp}
            asked = f"mesh.dp={self.dp}" if size == 1 else f"mesh: {_product(sizes)}"
            way = f"leave mesh.dp out to use all of them (dp={rest})" if rest else f"choose sizes of product {world}"
            raise ValueError(
                f"{asked}, but the launcher started {world} rank(s); start {size * self.dp} ranks, or {way}"
            )
        if rest is None:
            raise ValueError(
                f"mesh: {_product(model)} does not divide {world} rank(s); start a multiple of {size} ranks, or "
                f"{_fitting(model, world)}"
            )
        return rest


@dataclass(frozen=True)
class Grid:
    """A legal grid (made by `MeshConfig.grid`). Axes are named as in AXES; a rank is its global number."""

    pp: int = 1
    replicate: int = 1
    shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    expert_tensor: bool = False

    def __post_init__(self) -> None:
        assert (self.stage // (self.tp if self.expert_tensor else 1)) % self.ep == 0

    @property
    def dp(self) -> int:
        return self.replicate * self.shard

    @property
    def stage(self) -> int:
        """Ranks of one pipeline stage."""
        return self.dp * self.cp * self.tp

    @property
    def world(self) -> int:
        return self.pp * self.stage

    @cached_property
    def _axes(self) -> dict[str, tuple[int, int]]:
        """(size, stride) of every axis."""
        cp, tp, dp = self.cp, self.tp, self.dp
        expert = tp if self.expert_tensor else 1  # neighbours that hold parts of the same experts
        return {
            "pp": (self.pp, self.stage),
            "dp": (dp, cp * tp),
            "replicate": (self.replicate, self.shard * cp * tp),
            "shard": (self.shard, cp * tp),
            "cp": (cp, tp),
            "tp": (tp, 1),
            "ep": (self.ep, expert),
            "edp": (self.stage // (self.ep * expert), self.ep * expert),
            "dp_cp": (dp * cp, tp),
            "shard_cp": (self.shard * cp, tp),
            "dp_cp_tp": (self.stage, 1),
        }

    def extent(self, axis: str) -> tuple[int, int]:
        """(size, stride) of an axis: two axes with equal ones have the same groups. Raises ValueError for no axis of ours."""
        if axis not in self._axes:
            raise ValueError(f"no mesh axis {axis!r}; {guess(axis, list(AXES))}the axes are {', '.join(AXES)}")
        return self._axes[axis]

    def size(self, axis: str) -> int:
        """Ranks in each group of the axis."""
        return self.extent(axis)[0]

    def coordinate(self, axis: str, rank: int) -> int:
        """Place of a rank in its group of the axis, from 0."""
        size, stride = self.extent(axis)
        return rank // stride % size

    def ranks(self, axis: str, rank: int) -> list[int]:
        """The group of the axis that `rank` belongs to, in order."""
        size, stride = self.extent(axis)
        first = rank - self.coordinate(axis, rank) * stride
        return list(range(first, first + size * stride, stride))

    def groups(self, axis: str) -> list[list[int]]:
        """All groups of the axis: each rank is in exactly one."""
        return [self.ranks(axis, rank) for rank in range(self.world) if self.coordinate(axis, rank) == 0]

    def box(self, axes: tuple[str, ...], rank: int) -> list[int]:
        """The ranks that differ from `rank` along these axes only: a tensor of shape [size of each axis], flattened.

        axes: outer (larger stride) ones first. Raises ValueError for axes that overlap, as tp and ep do.
        """
        for outer, inner in itertools.pairwise(axis for axis in axes if self.size(axis) > 1):
            if self.extent(outer)[1] % math.prod(self.extent(inner)):
                raise ValueError(
                    f"mesh axes {outer} and {inner} do not form a grid: name axes that do not overlap, outer ones first"
                )
        ranks = [rank - sum(self.coordinate(axis, rank) * self.extent(axis)[1] for axis in axes)]
        for size, stride in map(self.extent, axes):
            ranks = [first + i * stride for first in ranks for i in range(size)]
        return ranks


Limit = int | Collection[int] | None
"""For one axis: the largest size, or the allowed sizes, or no limit."""


def layouts(
    world: int,
    *,
    pp: Limit = None,
    dp: Limit = None,
    replicate: Limit = None,
    cp: Limit = None,
    tp: Limit = None,
    ep: Limit = None,
    expert_tensor: bool | None = None,
) -> list[MeshConfig]:
    """Every legal mesh of `world` ranks within the limits, fewest axes first (then smallest sizes, in the order of the fields).

    expert_tensor: only layouts with or without it; None: both.
    """
    found = [
        MeshConfig(pp=p, dp=d, replicate=r, cp=c, tp=t, ep=e, expert_tensor=x)
        for p, d, c, t in _factorizations(world, 4)
        for r in _divisors(d)
        for x in (False, True)
        if not (x and t == 1) and expert_tensor in (None, x)
        for e in _divisors(d * c if x else d * c * t)
        if all(map(_allowed, (p, d, r, c, t, e), (pp, dp, replicate, cp, tp, ep)))
    ]

    def order(config: MeshConfig) -> tuple[int, ...]:
        sizes = (
            config.pp,
            config.dp or 1,
            config.replicate,
            config.cp,
            config.tp,
            config.ep,
            int(config.expert_tensor),
        )
        return (sum(size > 1 for size in sizes[:6]) + sizes[6], *sizes)

    return sorted(found, key=order)


def _allowed(size: int, limit: Limit) -> bool:
    if limit is None:
        return True
    return size <= limit if isinstance(limit, int) else size in limit


def _factorizations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (number,)
        return
    for first in _divisors(number):
        for rest in _factorizations(number // first, parts - 1):
            yield (first, *rest)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _product(sizes: dict[str, int], always: bool = False) -> str:
    """`pp=2 x tp=4 = 8`: the sizes above one (or all of them)."""
    factors = [f"{axis}={size}" for axis, size in sizes.items() if always or size > 1]
    return " x ".join(factors) + (f" = {math.prod(sizes.values())}" if len(factors) > 1 else "")


def _fitting(sizes: dict[str, int], world: int) -> str:
    """What one of the sizes may be on `world` ranks if the others stay."""
    choices = []
    for axis, size in sizes.items():
        others = math.prod(sizes.values()) // size
        if size > 1 and world % others == 0:
            choices.append(f"mesh.{axis} one of {_list(_divisors(world // others))}")
    if choices:
        return "make " + ", or ".join(choices)
    return f"choose sizes whose product is one of {_list(_divisors(world))}"
