"""A tensor of the whole model of which this rank holds some blocks: what a checkpoint reads and writes in its place.

torch.distributed.checkpoint asks three questions of a tensor that is not whole: which blocks to write, which to read, and where a
block lies. With the answers it saves each block once and reads into any other layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from parallel.layout import Box, Cuts, boxes, local, whole_shape


class Share(Tensor):
    """Shape and dtype are the whole tensor's; `held` is what this rank has, the live tensor (plain or DTensor).

    It is for naming, saving and loading. It computes nothing: of its operations there is `detach` only.
    """

    held: Tensor
    cuts: Cuts
    called: str

    @staticmethod
    def of(held: Tensor, cuts: Cuts, name: str) -> Tensor:
        """`held` itself if nothing of it is cut. name: for messages."""
        if not cuts:
            return held
        share = Tensor._make_wrapper_subclass(
            Share, whole_shape(held, cuts), dtype=held.dtype, device=held.device, requires_grad=False
        )
        share.held, share.cuts, share.called = held, cuts, name
        return share

    def boxes(self) -> list[Box]:
        """The blocks that this rank holds."""
        return boxes(self.held, self.cuts)

    def block(self, box: Box) -> Tensor:
        """One of them, as a view of what this rank holds."""
        return box.of(local(self.held))

    def fill(self, source: Tensor) -> None:
        """Copies from a whole tensor, or from a Share of the same blocks, into what this rank holds."""
        own = local(self.held)
        if isinstance(source, Share):
            assert source.boxes() == self.boxes(), f"{self.called}: other blocks"
            own.copy_(local(source.held))
            return
        for box in self.boxes():
            box.of(own).copy_(box.of_whole(source))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return Share.of(args[0].held.detach(), args[0].cuts, args[0].called)
        name = next((arg.called for arg in args if isinstance(arg, Share)), "a tensor")
        raise NotImplementedError(f"{func}: this rank holds only a part of {name}; use its .held, or save and load it")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Share({self.called}: {len(self.boxes())} blocks of {list(self.shape)}, {self.dtype})"

    def __create_write_items__(self, name: str, share: Any) -> list[WriteItem]:
        return write_items(self, name, TensorProperties.create_from_tensor(local(self.held)))

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(box.whole), torch.Size(box.sizes)) for box in self.boxes()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        for box in self.boxes():
            if box.whole == tuple(index.offset):
                return self.block(box)
        raise ValueError(f"no block of {index.fqn} at {tuple(index.offset)} on this rank")


def write_items(tensor: Any, name: str, properties: TensorProperties) -> list[WriteItem]:
    """What the planner of a save is told of a tensor of which this rank holds blocks: one item a block."""
    return [
        WriteItem(
            index=MetadataIndex(name, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=tensor.size()),
        )
        for chunk in tensor.__create_chunk_list__()
    ]
