"""The two ends of torch's checkpoint planner: it says which part of which tensor goes where, these read and write the bytes.

    00000.data  00000.sums    what rank 0 wrote, tensors one after the other, and the sums of its blocks (blocks.py)
    index.json                where every tensor's parts lie; names, shapes and dtypes; sealed (sealed.py)

No pickle: reading somebody's checkpoint runs none of their code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from pretrain.checkpoint import points
from pretrain.checkpoint.blocks import CheckedReader, DamagedBlock, HashingWriter
from pretrain.checkpoint.durable import write_new
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.folder import INDEX, writer
from pretrain.checkpoint.sealed import read_sealed, sealed

ALIGNMENT = 64  # bytes at which every tensor begins


class Place(NamedTuple):
    """Where a part of a tensor lies."""

    file: str
    start: int
    bytes: int


class File(NamedTuple):
    """One rank's data file: its size, and the hash of its sums."""

    bytes: int
    sums: str


class Writer(dcp.StorageWriter):
    """Writes this rank's parts to one file in `folder`; the coordinator then writes the index."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.sizes: dict[str, int] = {}  # of the files that this rank has written

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{self.rank:05d}.data"
        results = []
        places: list[tuple[Any, Place]] = []
        points.reached("writing")
        with HashingWriter(self.folder / name) as file:
            for item in plan.items:
                assert item.type is not WriteItemType.BYTE_IO, "tensors only"
                data = planner.resolve_data(item)
                assert isinstance(data, Tensor)
                file.align(ALIGNMENT)
                start = file.position
                file.write(as_bytes(data.detach().cpu().contiguous()))
                places.append((item, Place(name, start, file.position - start)))
            file.finish()
            sums = bytes(file.sums)
            size = file.position
        write_new(self.folder / sums_of(name), sums)
        self.sizes = {name: size, sums_of(name): len(sums)}
        record = File(size, xxhash.xxh3_128_hexdigest(sums))
        for item, place in places:
            results.append(WriteResult(item.index, place.bytes, (place, record)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files: dict[str, File] = {}
        places: dict[MetadataIndex, Place] = {}
        for result in (each for of_rank in results for each in of_rank):
            place, files[place.file] = result.storage_data
            places[result.index] = place
        tensors = {}
        for name, entry in sorted(metadata.state_dict_metadata.items()):
            assert isinstance(entry, TensorStorageMetadata)
            parts = [
                [list(part.offsets), list(part.sizes), *places[MetadataIndex(name, part.offsets)]]
                for part in entry.chunks
            ]
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "shape": list(entry.size), "parts": parts}
        points.reached("writing")
        index = self.folder / INDEX
        write_new(index, sealed({"tensors": tensors, "files": files}, indent=None))
        self.sizes[INDEX] = index.stat().st_size


class Reader(dcp.StorageReader):
    """Reads parts of tensors from `folder`; every block that it touches is checked."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError if the index cannot be read, ValueError never."""
        self.folder = folder
        self.metadata, self.places, self.files = read_index(folder)

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[str, list[tuple[Place, Any]]] = {}
        for item in plan.items:
            place = self.places[item.storage_index]
            wanted.setdefault(place.file, []).append((place, item))
        for name, items in wanted.items():
            with self.open(name) as file:
                for place, item in sorted(items, key=lambda each: each[0].start):
                    target = planner.resolve_tensor(item).detach()
                    sizes, dtype = self._part(item.storage_index)
                    if target.shape == sizes and target.dtype == dtype and target.is_contiguous() and target.is_cpu:
                        file.readinto(as_bytes(target), place.start)  # no copy
                    else:
                        part = torch.empty(sizes, dtype=dtype)
                        file.readinto(as_bytes(part), place.start)
                        for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                            part = part.narrow(dim, offset, length)
                        target.copy_(part)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def open(self, name: str) -> CheckedReader:
        """A data file and its sums. Raises CheckpointError if they do not fit the index."""
        size, digest = self.files[name]
        path = self.folder / sums_of(name)
        try:
            sums = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}{writer(name)}: {error.strerror}") from error
        if xxhash.xxh3_128_hexdigest(sums) != digest:
            raise CheckpointError(f"{path}{writer(name)} is damaged, or of another save than {INDEX}")
        try:
            return CheckedReader(self.folder / name, size, sums, writer(name))
        except OSError as error:
            raise CheckpointError(f"{self.folder / name}{writer(name)}: {error.strerror}") from error

    def check(self) -> list[str]:
        """Reads everything; a line for each damaged block or file, with the tensors that lie there."""
        faults = []
        for name in self.files:
            try:
                with self.open(name) as file:
                    faults += [f"{error}; {self._tensors_in(name, error)}" for error in file.check()]
            except CheckpointError as error:
                faults.append(str(error))
        return faults

    def _tensors_in(self, name: str, damage: DamagedBlock) -> str:
        hit = [
            index.fqn
            for index, place in self.places.items()
            if place.file == name and place.start < damage.end and damage.start < place.start + place.bytes
        ]
        return f"it holds {', '.join(hit[:3])}" + (f" and {len(hit) - 3} more tensors" if len(hit) > 3 else "")

    def _part(self, index: MetadataIndex) -> tuple[torch.Size, torch.dtype]:
        entry = self.metadata.state_dict_metadata[index.fqn]
        assert isinstance(entry, TensorStorageMetadata)
        if index.index is not None and entry.chunks[index.index].offsets == index.offset:
            return entry.chunks[index.index].sizes, entry.properties.dtype
        return next(part.sizes for part in entry.chunks if part.offsets == index.offset), entry.properties.dtype


def read_index(folder: Path) -> tuple[Metadata, dict[MetadataIndex, Place], dict[str, File]]:
    """Raises CheckpointError if the index is damaged or missing."""
    path = folder / INDEX
    try:
        raw = read_sealed(path)
    except OSError as error:
        raise CheckpointError(f"cannot read the index {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"cannot read the index: {error}") from error
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, Place] = {}
    for name, tensor in raw["tensors"].items():
        parts = []
        for number, (offsets, sizes, *place) in enumerate(tensor["parts"]):
            parts.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            places[MetadataIndex(name, offsets, number)] = Place(*place)
        properties = TensorProperties(dtype=getattr(torch, tensor["dtype"]))
        entries[name] = TensorStorageMetadata(properties, torch.Size(tensor["shape"]), parts)
    return Metadata(entries), places, {name: File(*file) for name, file in raw["files"].items()}


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else memoryview(bytearray())


def sums_of(name: str) -> str:
    return name.removesuffix(".data") + ".sums"
