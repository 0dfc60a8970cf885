"""Tensor and sequence parallelism, applied to a model from outside (Shoeybi et al. 2019, arXiv 1909.08053; Korthikanti et al.
2022, arXiv 2205.05198).

Between sublayers each of the tp ranks holds T / tp tokens of every row. A unit, that is a mixer or a dense FFN, gets all of them:

    x [B, T / tp, D] -> all-gather along T -> this rank's part of the unit -> reduce-scatter along T -> y [B, T / tp, D]

A module is a unit if it says how its parameters are cut over tp. What it states, as methods and attributes:
    splits() -> {parameter name: split}      those not named stay whole
    part(rank, ranks) -> module              the same class with one rank's parameters; the parts' outputs add up
    across(x)                                sums x over the parts; replaced here
    reads_wide                               x goes to it in its own precision, even under autocast
Modules that work on each token by itself stay whole, on the rank's own tokens: norms, routers, sparse FFNs.

A whole parameter has seen only a part of the tokens, or of the heads, on each rank: its gradient is summed over tp afterwards
(parallel/gradients.py). A model has an `embedding`, perhaps a `head`, `splits()` for their weights, and a `readout`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel import collectives
from parallel.layout import record
from parallel.vocabulary import VocabularyEmbedding, VocabularyReadout, check_length

if TYPE_CHECKING:
    from parallel.mesh import Mesh

MOST = 64  # sizes above are not listed in messages


def units(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of every unit, outermost first: a part of a unit is none."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{unit}.") for unit in found)
        if name and not inside and _splits(module):
            found.append(name)
            yield name, module


def check_tensor(model: nn.Module, tp: int, length: int | None = None, cp: int = 1) -> None:
    """Raises ValueError, naming the setting and the sizes that fit, unless `apply_tensor` works for this model and tp.

    model: looked at, not computed with; it may be on the meta device. length: tokens of a row before context parallelism.
    """
    if tp == 1:
        return
    if length is not None:
        multiple = tp * (2 * cp if cp > 1 else 1)
        if length % multiple:
            raise ValueError(
                f"data.sequence_length={length} cannot be cut over mesh.tp={tp} and mesh.cp={cp}; "
                f"choose a multiple of {multiple}"
            )
    cut = {"model": model, **dict(units(model))}
    for name, module in model.named_modules():
        if getattr(module, "moves_along_sequence", False) and name not in cut:
            raise ValueError(
                f"{name} ({type(module).__name__}) cannot be cut over mesh.tp={tp}; use another mixer, or mesh.tp=1"
            )
    splits = [split for module in cut.values() for split in _splits(module).values()]
    for name, module in cut.items():
        for split in _splits(module).values():
            obstacle = split.obstacle(tp)
            if obstacle is not None:
                valid = (str(n) for n in range(1, MOST + 1) if all(other.obstacle(n) is None for other in splits))
                raise ValueError(
                    f"{obstacle} of {name} ({type(module).__name__}) cannot be cut over mesh.tp={tp}; "
                    f"this model allows mesh.tp {', '.join(valid)}"
                )


def apply_tensor(model: nn.Module, mesh: Mesh) -> None:
    """Keeps this rank's part of a whole model, the same on all tp ranks, and makes the ranks compute it together.

    Call it before the engine wraps the model and before an optimizer sees its parameters. Parameters keep their names; how they
    are cut is recorded (parallel/layout.py). Raises ValueError as `check_tensor`.
    """
    group = mesh.group("tp")
    if group is None:
        return
    rank, ranks = mesh.rank("tp"), mesh.size("tp")
    check_tensor(model, ranks)
    for name, unit in list(units(model)):
        splits = _splits(unit)
        part = unit.part(rank, ranks)
        record(part, {parameter: (split,) for parameter, split in splits.items()}, mesh)
        part.across = partial(_across, group=group)
        part.register_forward_pre_hook(partial(_gather_tokens, group=group))
        part.register_forward_hook(partial(_scatter_sum, group=group))
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, part)
    for module in model.modules():
        if getattr(module, "contextual", False) and not _splits(module):
            module.register_forward_pre_hook(partial(_slice_sequence, rank=rank, group=group))
    _share_vocabulary(model, mesh, rank, ranks, group)


def _share_vocabulary(model: Any, mesh: Mesh, rank: int, ranks: int, group: dist.ProcessGroup) -> None:
    splits = _splits(model)
    for name, split in splits.items():
        owner, _, parameter = name.rpartition(".")
        module = model.get_submodule(owner)
        rows = split.take(getattr(module, parameter).detach(), rank, ranks)
        if isinstance(module, nn.Embedding):
            setattr(model, owner, VocabularyEmbedding(module, rows, rank, group))
        else:
            setattr(module, parameter, nn.Parameter(rows, getattr(module, parameter).requires_grad))
            module.out_features = rows.shape[0]
    record(model, {name: (split,) for name, split in splits.items()}, mesh)
    model.readout = VocabularyReadout(group)


def _gather_tokens(module: Any, args: tuple[Any, ...], group: dist.ProcessGroup) -> tuple[Any, ...]:
    x, *others = args
    if torch.is_autocast_enabled(x.device.type) and not module.reads_wide:
        x = x.to(torch.get_autocast_dtype(x.device.type))  # as its first product would: half the bytes to gather
    # Contiguous: gathered along T, rows of a batch lie interleaved.
    return (collectives.all_gather(x, 1, group).contiguous(), *others)


def _scatter_sum(module: nn.Module, args: tuple[Any, ...], output: Any, group: dist.ProcessGroup) -> Any:
    if isinstance(output, tuple):  # (y, carry)
        return (collectives.reduce_scatter(output[0], 1, group), *output[1:])
    return collectives.reduce_scatter(output, 1, group)


def _across(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    # Every part uses the sum in its own way: gradients are summed as well.
    return collectives.copy(collectives.all_reduce(x, group), group)


class SequenceSlice:
    """What a sparse FFN asks of a sequence context, for this rank's T / tp tokens of every row."""

    def __init__(self, sequence: Any, rank: int, group: dist.ProcessGroup):
        self.sequence, self.rank, self.group = sequence, rank, group

    @property
    def positions(self) -> Tensor:
        return self._own(self.sequence.positions)

    def owners(self) -> tuple[Tensor, int]:
        """(the sequence of each of this rank's tokens, int64 [B * T / tp]; how many there are)."""
        owner, count = self.sequence.owners()
        return self._own(owner.view(self.sequence.positions.shape)).flatten(), count

    def total(self, counts: Tensor) -> Tensor:
        """Counts over this rank's tokens, summed over all ranks that hold tokens of the same rows."""
        return self.sequence.total(collectives.summed(counts, self.group))

    def _own(self, of_tokens: Tensor) -> Tensor:
        ranks = dist.get_world_size(self.group)
        check_length(of_tokens.shape[1], ranks)
        return of_tokens.chunk(ranks, dim=1)[self.rank]


def _slice_sequence(module: nn.Module, args: tuple[Any, ...], rank: int, group: dist.ProcessGroup) -> tuple[Any, ...]:
    x, sequence, *others = args
    return (x, SequenceSlice(sequence, rank, group), *others)


def _splits(module: nn.Module) -> dict[str, Any]:
    splits = getattr(module, "splits", None)
    return {} if splits is None else {name: split for name, split in splits().items() if split.axis == "tp"}
