"""The state of one moment, copied to host memory so that training may go on while it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import WriteItem

from parallel.share import write_items


class Frozen(Tensor):
    """Stands for a tensor of which this rank holds blocks; it keeps copies of them. It can be saved, and nothing else."""

    blocks: dict[tuple[int, ...], Tensor]

    @staticmethod
    def of(like: Tensor, blocks: dict[tuple[int, ...], Tensor]) -> Frozen:
        made: Frozen = Tensor._make_wrapper_subclass(Frozen, like.shape, dtype=like.dtype, device=torch.device("cpu"))
        made.blocks = blocks
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return Frozen.of(args[0], args[0].blocks)
        raise NotImplementedError(f"{func}: this is a snapshot of blocks, made to be saved")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Frozen({len(self.blocks)} blocks of {list(self.shape)}, {self.dtype})"

    def __create_write_items__(self, name: str, frozen: Any) -> list[WriteItem]:
        return write_items(self, name, TensorProperties(dtype=self.dtype))

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), block.shape) for offsets, block in self.blocks.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.blocks[tuple(index.offset)]


def blocks_of(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """(name, offsets in the whole tensor, block) of all that this rank holds, as views; of a snapshot as of the live tensors."""
    for name, tensor in sorted(tensors.items()):
        if not hasattr(tensor, "__create_chunk_list__"):
            yield name, (), tensor.detach()
            continue
        for chunk in tensor.__create_chunk_list__():
            block = tensor.__get_tensor_shard__(MetadataIndex(name, chunk.offsets))  # type: ignore[attr-defined]
            yield name, tuple(chunk.offsets), block.detach()


def held_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that a snapshot of these takes on this rank."""
    return sum(block.nbytes for _, _, block in blocks_of(tensors))


class Snapshots:
    """Takes snapshots into the same host memory again and again: one copy of this rank's state, no more."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of all tensors, valid until the next call."""
        memory: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        frozen = {name: self._freeze(name, tensor, memory) for name, tensor in tensors.items()}
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()  # the copies were only queued
        self._memory = memory
        return frozen

    def _freeze(self, name: str, tensor: Tensor, memory: dict[tuple[str, tuple[int, ...]], Tensor]) -> Tensor:
        if not hasattr(tensor, "__create_chunk_list__"):
            return self._copy((name, ()), tensor, memory)
        blocks = {
            offsets: self._copy((name, offsets), block, memory) for _, offsets, block in blocks_of({name: tensor})
        }
        return Frozen.of(tensor, blocks)

    def _copy(
        self, key: tuple[str, tuple[int, ...]], source: Tensor, memory: dict[tuple[str, tuple[int, ...]], Tensor]
    ) -> Tensor:
        held = self._memory.get(key)
        if held is None or held.shape != source.shape or held.dtype != source.dtype:
            # Pinned memory is what a device copies to without stopping the host.
            held = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        memory[key] = held
        return held.copy_(source.detach(), non_blocking=True)
