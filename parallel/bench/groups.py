"""The groups of ranks that a run measures: which there are, as arithmetic, and their formation.

Groups of a shape cover all ranks, and each is an arithmetic progression: `size` ranks, `stride` apart. So every axis of
a training mesh is a shape, and so are a node (neighbours) and a rail (the ranks of one number on all nodes).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from pydantic import ValidationError

from parallel.config import guess
from parallel.grid import AXES, Grid, MeshConfig
from parallel.mesh import form

WORDS = ("world", "node", "rail")


@dataclass(frozen=True)
class Shape:
    """Groups of `size` ranks, `stride` apart. also: other names of the same groups."""

    name: str
    size: int
    stride: int = 1
    also: tuple[str, ...] = ()

    def groups(self, world: int) -> list[list[int]]:
        """All groups of the shape; each rank is in exactly one. world must be a multiple of size * stride."""
        assert world % (self.size * self.stride) == 0
        firsts = (rank for rank in range(world) if rank // self.stride % self.size == 0)
        return [list(range(first, first + self.size * self.stride, self.stride)) for first in firsts]


@dataclass(frozen=True)
class Team:
    """One rank's group of a shape. works: False where the rank only waits for others (--one-group)."""

    shape: Shape
    ranks: tuple[int, ...]
    place: int
    group: dist.ProcessGroup
    works: bool = True

    @property
    def size(self) -> int:
        return self.shape.size


def choose(words: Sequence[str], world: int, node: int, grid: Grid | None) -> list[Shape]:
    """The shapes that `--groups` names; without words every axis of the grid, or the world.

    node: ranks of one node. Shapes with the same ranks are measured once, under the first name. Raises ValueError for
    names that do not exist and sizes that do not divide the number of ranks.
    """
    if not words:
        axes = [axis for axis in AXES if grid is not None and grid.size(axis) > 1]
        words = axes or ["world"]
    shapes: dict[tuple[int, int], Shape] = {}
    for word in words:
        shape = _shape(word, world, node, grid)
        # A single rank is the same group whatever its stride, and so are all ranks of a job.
        extent = (shape.size, shape.stride if shape.size > 1 else 1)
        before = shapes.get(extent)
        if before is None:
            shapes[extent] = replace(shape, stride=extent[1])
        elif shape.name not in (before.name, *before.also):
            shapes[extent] = replace(before, also=(*before.also, shape.name))
    return list(shapes.values())


def _shape(word: str, world: int, node: int, grid: Grid | None) -> Shape:
    if word == "world":
        return Shape("world", world)
    if word in ("node", "rail"):
        if world % node:
            raise ValueError(
                f"--groups {word}: nodes of {node} ranks do not divide {world} ranks; start the same number on every node, "
                f"or set --node-size to one of {_divisors(world)}"
            )
        if word == "node":
            return Shape("node", node)
        if node == world:
            raise ValueError(
                f"--groups rail: a rail links the ranks of one number on all nodes, but all {world} ranks are on one node; "
                f"--node-size cuts them into nodes of another size for a trial: one of {_divisors(world)}"
            )
        return Shape("rail", world // node, node)
    match = re.fullmatch(r"(?:n=)?(\d+)(?::(\d+))?", word)
    if match:
        size, stride = int(match[1]), int(match[2] or 1)
        if size < 1 or stride < 1 or world % (size * stride):
            far = f", every {stride}th" if match[2] else ""
            raise ValueError(
                f"--groups {word}: groups of {size} ranks{far} do not divide {world} ranks; "
                f"the number of ranks must be a multiple of {max(size * stride, 1)}; sizes that fit: {_divisors(world)}"
            )
        return Shape(f"n={size}" + (f":{stride}" if stride > 1 else ""), size, stride)
    if word in AXES:
        if grid is None:
            raise ValueError(f"--groups {word} is a mesh axis: say which mesh with --config FILE or --mesh {word}=SIZE")
        size, stride = grid.extent(word)
        return Shape(word, size, stride)
    raise ValueError(
        f"--groups {word!r}: no such group; {guess(word, [*WORDS, *AXES])}a group is {', '.join(WORDS)}, a size such as 4, "
        f"a size and a stride such as 4:8, or, with --config or --mesh, an axis: {', '.join(AXES)}"
    )


def read_mesh(config: Path | None, sizes: Sequence[str]) -> MeshConfig:
    """The mesh section of a training config, with `tp=2` and the like put over it.

    Raises ValueError where the file cannot be read or the section is wrong.
    """
    section: Any = {}
    where = str(config) if config else "--mesh"
    if config is not None:
        try:
            whole = yaml.safe_load(config.read_text())
        except FileNotFoundError:
            raise ValueError(
                f"--config {config}: no such file; choose a run file such as configs/runs/X.yaml"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--config {config}: cannot be read: {error}") from None
        except yaml.YAMLError as error:
            raise ValueError(f"--config {config}: not valid YAML: {' '.join(str(error).split())}") from None
        section = (whole.get("mesh") or {}) if isinstance(whole, dict) else None
        if not isinstance(section, dict):
            raise ValueError(f"--config {config}: expected sections of keys, among them `mesh:`")
    for word in sizes:
        axis, _, value = word.partition("=")
        if not value.isdigit():
            raise ValueError(f"--mesh {word!r}: write axes with their sizes, such as tp=2,pp=4")
        section = {**section, axis.removeprefix("mesh."): int(value)}
    try:
        return MeshConfig.model_validate(section)
    except ValidationError as error:
        raise ValueError("\n".join(f"{where}: {line}" for line in _faults(error))) from None


def _faults(error: ValidationError) -> list[str]:
    lines = []
    for fault in error.errors():
        path = ["mesh", *map(str, fault["loc"])]
        if fault["type"] == "unknown_key":
            path.append(fault["ctx"]["key"])
        lines.append(f"{'.'.join(path)}: {fault['msg'].removeprefix('Value error, ')}")
    return lines


def teams(shapes: Sequence[Shape], rank: int, world: int, one_group: bool, timeout: timedelta) -> list[Team]:
    """This rank's team of every shape: collective over the job, which forms the groups in one order on all ranks."""
    made = []
    for shape in shapes:
        groups = shape.groups(world)
        group = form(groups, f"bench_{shape.name}", timeout)
        assert group is not None
        mine = next(ranks for ranks in groups if rank in ranks)
        made.append(Team(shape, tuple(mine), mine.index(rank), group, not one_group or mine is groups[0]))
    return made


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
