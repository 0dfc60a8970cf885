"""How bytes are written: named tensors to a folder and back, over torch.distributed.checkpoint and its planner.

The planner gives each rank the shards that it holds and keeps one copy of what is replicated; at read time it cuts
whatever the new layout needs out of whatever the old layout wrote. So one checkpoint serves any number of ranks and
any sharding. Whether a folder counts as a checkpoint is not decided here (lifecycle.py).

What the bytes look like is planned.py's.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pretrain.checkpoint import points
from pretrain.checkpoint.agreement import Agreement
from pretrain.checkpoint.durable import fsync_folder
from pretrain.checkpoint.folder import META
from pretrain.checkpoint.planned import Reader, Writer, read_index


@dataclass(frozen=True)
class Spec:
    """What the index says about one stored tensor, whole (not a shard)."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def write(folder: Path, tensors: Mapping[str, Tensor], agreement: Agreement | None = None) -> dict[str, int]:
    """Write named tensors to `folder`, which exists and is empty. Collective over `agreement`.

    tensors: plain tensors, DTensors or Shares (parallel/share.py), on any device. A name that several ranks hold is one
    tensor: parts of it if they are DTensors or Shares, equal copies if they are plain. A name may also live on one rank
    only. Each part is written once, under its place in the whole tensor. Returns on the
    coordinator the name and size in bytes of each file written by any rank, {} elsewhere. All are fsynced, and so is
    the folder, but for the coordinator: it has more to write there, and fsyncs the folder last of all. Raises
    CheckpointError on every rank if any rank failed; files may then be left behind.
    """
    agreement = agreement or Agreement()
    writer = Writer(folder, agreement.rank)
    detached = {name: tensor.detach() for name, tensor in tensors.items()}

    def save() -> dict[str, int]:
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _no_warning_about_one_process():
            dcp.save(
                detached,
                storage_writer=writer,
                planner=planner,
                process_group=agreement.group,
                no_dist=not agreement.distributed,
            )
        if not agreement.coordinator:
            fsync_folder(folder)
        points.reached("written")
        return writer.sizes

    written = agreement.everyone(f"writing {folder}", save)
    return {name: size for sizes in written for name, size in sizes.items()}


def contents(folder: Path) -> dict[str, Spec]:
    """Name, shape and dtype of every tensor stored in `folder`. Raises CheckpointError if its index cannot be read."""
    index = read_index(folder)[0].state_dict_metadata
    return {
        name: Spec(tuple(entry.size), entry.properties.dtype)
        for name, entry in index.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read(
    folder: Path,
    tensors: Mapping[str, Tensor],
    agreement: Agreement | None = None,
    *,
    subset: bool = False,
    cast_dtype: bool = False,
) -> None:
    """Fill the given tensors, in place, from `folder`. Collective over `agreement`; each rank names what it holds.

    A section (the part of a name before the first `/`: model, optimizer) is read whole or not at all: of a section that
    some rank asks for, the names given by all ranks together must be the names stored, with equal shapes and dtypes.
    subset: a part of a section will do. cast_dtype: convert instead of refusing another dtype.
    Raises, on every rank, ValueError listing the names and shapes that do not fit (nothing is read then), or
    CheckpointError if the stored bytes cannot be read (the tensors are then partly filled).
    """
    agreement = agreement or Agreement()

    def compare() -> tuple[list[str], set[str], set[str]]:
        stored = contents(folder)
        problems = []
        for name, tensor in sorted(tensors.items()):
            wanted = Spec(tuple(tensor.shape), tensor.dtype)
            found = stored.get(name)
            if found is None:
                problems.append(f"missing from the checkpoint: {name} ({wanted})")
            elif found.shape != wanted.shape or (found.dtype != wanted.dtype and not cast_dtype):
                problems.append(f"differs: {name} is {found} in the checkpoint and {wanted} here")
        return problems, {_section(name) for name in tensors}, set(stored) - set(tensors)

    answers = agreement.everyone(f"reading {folder}", compare)

    def judge() -> None:
        problems = list(dict.fromkeys(problem for found, _, _ in answers for problem in found))
        sections = set.union(*(asked for _, asked, _ in answers))
        unclaimed = set.intersection(*(rest for _, _, rest in answers))
        if not subset:
            left = sorted(name for name in unclaimed if _section(name) in sections)
            problems += [f"in the checkpoint but not asked for: {name}" for name in left]
        if problems:
            more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
            raise ValueError(
                "\n  ".join([f"{folder} does not fit this model and optimizer:", *problems[:20], *more])
                + f"\nUse the configuration that wrote it (it is in its {META}), or start another run folder."
            )

    agreement.decide(f"reading {folder}", judge)

    detached: dict[str, Tensor] = {name: tensor.detach() for name, tensor in tensors.items()}

    def load() -> None:
        reader = Reader(folder)
        with _no_warning_about_one_process():
            dcp.load(
                detached,
                storage_reader=reader,
                planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=agreement.group,
                no_dist=not agreement.distributed,
            )

    agreement.everyone(f"reading {folder}", load)


@contextmanager
def _no_warning_about_one_process() -> Generator[None, None, None]:
    # Without a process group torch assumes one process, aloud; here that is a supported case.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _section(name: str) -> str:
    return name.split("/", 1)[0]
