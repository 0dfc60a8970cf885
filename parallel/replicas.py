"""Do the ranks that hold the same values still hold the same bits?

Data-parallel replicas, norms that tensor parallelism leaves whole, optimizer state, the embedding that two pipeline stages share:
many blocks of the model's and the optimizer's tensors are on several ranks, which update them alike. A bit that memory has
flipped on one of them stays there, and spoils everybody's gradients; the training loss may not show it for thousands of steps.

Which ranks hold a block follows from names and places alone (parallel/layout.py says them of every tensor), so there is nothing
here about kinds of parallelism. What only one rank holds, as with full sharding, has no second witness and is not covered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.layout import boxes, local
from parallel.processes import Processes
from parallel.share import Share

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Difference(NamedTuple):
    """A block that is not the same on all its holders. odd: the ranks outvoted by the others; all holders where none are."""

    name: str
    holders: list[int]
    odd: list[int]


class Replicas:
    """tensors: by name, as `Engine.replicated` gives them: the same names in the same order at every call. Collective."""

    def __init__(self, tensors: Mapping[str, Tensor], processes: Processes):
        self.processes = processes
        places = [(name, place, block.numel() * block.element_size()) for name, place, block in _blocks(tensors)]
        keys = self._gather(torch.tensor([_hash_text(name + place) for name, place, _ in places], dtype=torch.int64))
        _, inverse, counts = torch.unique(keys, return_inverse=True, return_counts=True)
        several = (counts[inverse] > 1) & (keys != 0)  # 0 fills up the rows of ranks with fewer blocks
        self.shared = several[processes.rank][: len(places)].nonzero().flatten().tolist()
        self.names = [places[index][0] for index in self.shared]
        # [ranks, blocks]: the number of the group of ranks that each rank's shared blocks belong to; -1 fills up.
        own = inverse[processes.rank][: len(places)][several[processes.rank][: len(places)]]
        self.groups = self._gather(own + 1) - 1
        self.covered = self._coverage(places)

    def _coverage(self, places: list[tuple[str, str, int]]) -> float:
        """The share of all ranks' bytes of parameters that other ranks hold too."""
        shared = set(self.shared)
        sizes = [(size, index in shared) for index, (name, _, size) in enumerate(places) if name.startswith("model/")]
        both = self.processes.sum([sum(size for size, held in sizes if held), sum(size for size, _ in sizes)])
        return both[0] / max(both[1], 1.0)

    @torch.no_grad()
    def check(self, tensors: Mapping[str, Tensor]) -> list[Difference]:
        """The blocks whose holders differ, in bits; the same list on every rank. Collective."""
        if self.groups.numel() == 0:
            return []
        blocks = [block for _, _, block in _blocks(tensors)]
        hashes = [fingerprint(blocks[index]) for index in self.shared]
        device = self.processes.device
        own = torch.stack([value.to(device) for value in hashes]) if hashes else torch.empty(0, dtype=torch.int64)
        values = self._gather(own, self.groups.shape[1])
        count = int(self.groups.max()) + 2
        flat = (self.groups + 1).flatten()
        low = torch.full((count,), torch.iinfo(torch.int64).max).scatter_reduce(0, flat, values.flatten(), "amin")
        high = torch.full((count,), torch.iinfo(torch.int64).min).scatter_reduce(0, flat, values.flatten(), "amax")
        low[0] = high[0] = 0  # the filling
        differing = [group - 1 for group in (low < high).nonzero().flatten().tolist()]
        return self._describe(differing, values) if differing else []

    def _describe(self, differing: list[int], values: Tensor) -> list[Difference]:
        rank = self.processes.rank
        own = {group: name for group, name in zip(self.groups[rank].tolist(), self.names) if group in differing}
        names: list[dict[int, str]] = [{}] * self.processes.world
        dist.all_gather_object(names, own)
        known = {group: name for each in names for group, name in each.items()}
        found = []
        for group in differing:
            holders, slots = (self.groups == group).nonzero().unbind(1)
            held = dict(zip(holders.tolist(), values[holders, slots].tolist()))
            (common, votes), *_ = Counter(held.values()).most_common(1)
            outvoted = [holder for holder, value in held.items() if value != common]
            found.append(Difference(known[group], list(held), outvoted if 2 * votes > len(held) else list(held)))
        return found

    def _gather(self, own: Tensor, width: int | None = None) -> Tensor:
        """int64 [n] of every rank -> [ranks, width] on the CPU, rows filled up with zeros. width: the largest n if left out."""
        world, device = self.processes.world, self.processes.device
        own = own.to(device)
        if world == 1:
            return own.cpu()[None]
        if width is None:
            largest = own.new_tensor(own.numel())
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            width = int(largest)
        padded = own.new_zeros(width)
        padded[: own.numel()] = own
        rows = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(rows, padded)
        return torch.stack(rows).cpu()


def fingerprint(block: Tensor) -> Tensor:
    """int64, zero dims, of a block's bits. On a CPU xxh3; on a GPU, where it stays, the sum of the words: any one flipped bit
    changes it, and no copy of the block is made."""
    if block.device.type == "cpu":
        import xxhash

        flat = block.reshape(-1)
        if flat.numel() == 0 or flat.stride(0) != 1:
            flat = flat.clone(memory_format=torch.contiguous_format)
        return torch.tensor(_signed(xxhash.xxh3_64_intdigest(flat.view(torch.uint8).numpy().data)))
    return block.view(_INTEGERS[block.element_size()]).sum(dtype=torch.int64)


def _blocks(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """(name, where in the whole tensor, the block) for each block that this rank holds."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Share):
            for box in tensor.boxes():
                yield name, f"{box.whole}{box.sizes}", tensor.block(box)
        elif isinstance(tensor, DTensor):
            for box in boxes(tensor, ()):
                yield name, f"{box.whole}{box.sizes}", box.of(local(tensor))
        else:
            yield name, f"{(0,) * tensor.dim()}{tuple(tensor.shape)}", tensor


def _hash_text(text: str) -> int:
    import xxhash

    return _signed(xxhash.xxh3_64_intdigest(text.encode())) or 1


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
