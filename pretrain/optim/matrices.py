"""Which parameters of a model are matrices, for optimizers that treat a matrix as one thing, and where each matrix lies.

A parameter may hold several: queries, keys and values end to end, gate and up projection, one for each expert of a stack. A
weight of a linear layer is [outputs, inputs], an expert stack [experts, inputs, outputs]. Embedding and head (tables of vectors),
norms, biases, taps, rates and whatever has a side of one are none.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import nn

# Parameters with two dims or more that are no matrices, by the ends of their names; all taps and rates are vectors side by side.
NO_MATRICES = ("embedding.weight", ".conv", ".depthwise", ".grouped", ".A_log", "bias")
HEADS = ("head.weight",)
# Of these, each head can be a matrix by itself.
PER_HEAD = ("qkv.weight", "query.weight", "kv_up.weight")


class Matrix(NamedTuple):
    """A block of a whole parameter: its first entry and its sizes, in the parameter's dims; the dim of a stack has size 1."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    outputs: int
    inputs: int


Described = dict[str, tuple[Matrix, ...]]


def describe(model: nn.Module, per_head: bool = False, apart: Collection[str] = ()) -> Described:
    """The matrices of every parameter that consists of such, by its name. model: the whole one, uncut, perhaps on meta.

    per_head: queries, keys and values of each head are matrices of their own. apart: patterns (as *.router.*) of names that are
    to be left out. Raises ValueError for a pattern that fits no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in apart:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"{pattern!r} in the list of parameters for AdamW fits none of the model's parameters")
    sections = dict(_sections(model))
    found: Described = {}
    for name, parameter in model.named_parameters():
        left_out = any(fnmatch.fnmatchcase(name, pattern) for pattern in apart)
        if parameter.requires_grad and not left_out and is_matrix(name, tuple(parameter.shape)):
            heads = per_head and name.endswith(PER_HEAD)
            found[name] = tuple(_matrices(tuple(parameter.shape), sections.get(name, {}), heads))
    return found


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    if len(shape) not in (2, 3) or min(shape[-2:]) == 1 or name.endswith(NO_MATRICES):
        return False
    return not any(name == head or name.endswith(f".{head}") for head in HEADS)


Sections = dict[int, list[tuple[int, int]]]  # by dim: (length, units) of what lies end to end


def _sections(model: nn.Module) -> Iterator[tuple[str, Sections]]:
    """What lies end to end in each parameter, from what modules say of how these are cut, and from what they say besides."""
    for prefix, module in model.named_modules():
        of: Any = module
        stated: dict[str, Sections] = {}
        for name, split in (of.splits() if hasattr(module, "splits") else {}).items():
            stated.setdefault(name, {})[split.dim] = [(section.length, section.count) for section in split.sections]
        for name, splits in (of.expert_splits() if hasattr(module, "expert_splits") else {}).items():
            for split in splits:
                stated.setdefault(name, {})[split.dim] = [(section.length, section.count) for section in split.sections]
        for name, (dim, lengths) in (of.end_to_end() if hasattr(module, "end_to_end") else {}).items():
            stated.setdefault(name, {})[dim] = [(length, length) for length in lengths]
        yield from ((f"{prefix}.{name}" if prefix else name, each) for name, each in stated.items())


def _matrices(shape: tuple[int, ...], sections: Sections, heads: bool) -> Iterator[Matrix]:
    stack, (first, second) = shape[:-2], shape[-2:]
    along = [
        _runs(sections.get(len(stack) + dim, [(length, length)]), length, heads)
        for dim, length in enumerate((first, second))
    ]
    for index in range(stack[0] if stack else 1):
        lead = (index,) if stack else ()
        for row, rows in along[0]:
            for column, columns in along[1]:
                outputs, inputs = (columns, rows) if stack else (rows, columns)
                yield Matrix((*lead, row, column), (*(1 for _ in lead), rows, columns), outputs, inputs)


def _runs(sections: list[tuple[int, int]], whole: int, heads: bool) -> list[tuple[int, int]]:
    """(start, length) of each section, or of its units where these are heads."""
    runs, start = [], 0
    for length, count in sections:
        unit = length // count if heads and count < length else length
        runs += [(place, unit) for place in range(start, start + length, unit)]
        start += length
    assert start == whole, "sections fill the dim"
    return runs
