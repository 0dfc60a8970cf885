"""Where each chunk of a batch lies, for dense batches and for sequences packed by cu_seqlens.

Chunks never straddle sequences, so the number of chunks of a packed batch depends on the values in cu_seqlens, which
live on the device. Reading them would stall the host. The tables here are sized by a bound that the host knows without
looking, `tokens // size + N`. Slots beyond the last chunk are marked with sequence -1: a kernel returns at once there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class Chunks:
    """The chunks of a batch of token spans.

    size: tokens in a chunk. sequences: N. count: slots to launch, exact for a dense batch, a bound for a packed one.
    tokens: length T of each sequence if dense, total tokens if packed.
    The tensors are None for a dense batch, where arithmetic replaces them:
    cu_seqlens int32 [N + 1]; indices int32 [count, 2], (sequence, chunk within it), sequence -1 in unused slots;
    offsets int32 [N + 1], first slot of each sequence.
    """

    size: int
    sequences: int
    tokens: int
    count: int
    cu_seqlens: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    offsets: torch.Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None


def dense_chunks(batch: int, length: int, size: int) -> Chunks:
    """Chunks of `batch` sequences of `length` tokens each."""
    return Chunks(size=size, sequences=batch, tokens=length, count=batch * -(-length // size))


_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed_chunks(cu_seqlens: torch.Tensor, tokens: int, size: int) -> Chunks:
    """Chunks of sequences packed along time: cu_seqlens int32 [N + 1], `tokens` in all. Empty sequences have no chunk.

    The result is kept with the cu_seqlens tensor: a model with many layers builds it once a step. An in-place change of
    cu_seqlens is noticed through the tensor's version counter.
    """
    if cu_seqlens.is_inference():  # such tensors carry no version counter
        return _build(cu_seqlens, tokens, size)
    known = _tables.setdefault(cu_seqlens, {})
    key = (tokens, size, cu_seqlens._version)
    if key not in known:
        known[key] = _build(cu_seqlens.detach(), tokens, size)
    return known[key]


def _build(cu_seqlens: torch.Tensor, tokens: int, size: int) -> Chunks:
    sequences = cu_seqlens.numel() - 1
    count = min(tokens // size + sequences, tokens)
    cu = cu_seqlens.to(torch.int32)
    per_sequence = (cu.diff() + (size - 1)) // size
    offsets = torch.nn.functional.pad(per_sequence.cumsum(0, dtype=torch.int32), (1, 0))
    slots = torch.arange(count, device=cu.device, dtype=torch.int32)
    # right=True steps over empty sequences, whose offset equals the next one's.
    owner = torch.searchsorted(offsets[1:].contiguous(), slots, right=True, out_int32=True)
    inside = owner < sequences
    first = offsets[owner.clamp(max=sequences)]
    indices = torch.stack([torch.where(inside, owner, -1), torch.where(inside, slots - first, 0)], dim=1)
    indices = indices.to(torch.int32)
    return Chunks(size, sequences, tokens, count, cu.contiguous(), indices.contiguous(), offsets.contiguous())


@triton.jit
def locate_chunk(slot, cu_seqlens, indices, T, BT: tl.constexpr, PACKED: tl.constexpr):
    """(sequence, chunk within it, first token of the sequence [int64], tokens in it). Sequence -1: an unused slot."""
    if PACKED:
        sequence = tl.load(indices + slot * 2).to(tl.int32)
        chunk = tl.load(indices + slot * 2 + 1).to(tl.int32)
        safe = tl.maximum(sequence, 0)
        begin = tl.load(cu_seqlens + safe).to(tl.int64)
        length = (tl.load(cu_seqlens + safe + 1) - begin).to(tl.int32)
    else:
        per_sequence = tl.cdiv(T, BT)
        sequence = slot // per_sequence
        chunk = slot % per_sequence
        begin = tl.cast(sequence, tl.int64) * T
        length = T
    return sequence, chunk, begin, length


@triton.jit
def locate_sequence(sequence, cu_seqlens, offsets, T, BT: tl.constexpr, PACKED: tl.constexpr):
    """(first token of the sequence [int64], tokens in it, slot of its first chunk [int64])."""
    if PACKED:
        begin = tl.load(cu_seqlens + sequence).to(tl.int64)
        length = (tl.load(cu_seqlens + sequence + 1) - begin).to(tl.int32)
        first = tl.load(offsets + sequence).to(tl.int64)
    else:
        begin = tl.cast(sequence, tl.int64) * T
        length = T
        first = tl.cast(sequence, tl.int64) * tl.cdiv(T, BT)
    return begin, length, first
