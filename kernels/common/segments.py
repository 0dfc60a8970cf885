"""Cutting sequences into segments, so that a scan over time has enough programs to fill the device.

A segment is a whole number of chunks of one sequence. Its tables have the form of a packed batch (begin of each segment,
slot of its first chunk), so a scan kernel written for packed sequences walks segments without knowing it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from kernels.common.chunks import Chunks, packed_chunks


@dataclass(frozen=True)
class Segments:
    """tokens: length of a segment. count: segments, a bound for a packed batch, whose unused ones are empty.

    begins: int32 [count + 1], first token of each; slots: int32 [count], chunk slot of each one's first chunk;
    first: int32 [N + 1], first segment of each sequence.
    """

    tokens: int
    count: int
    begins: torch.Tensor
    slots: torch.Tensor
    first: torch.Tensor


def segments_of(chunks: Chunks, source: torch.Tensor | None, tokens: int, device: torch.device) -> Segments:
    """The segments of `chunks`' sequences. source: the cu_seqlens tensor of the user, which the tables are kept with."""
    assert tokens % chunks.size == 0, "a segment is a whole number of chunks"
    if source is None:
        return _dense(chunks.sequences, chunks.tokens, chunks.size, tokens, device)
    if source.is_inference():
        return _packed(chunks, tokens)
    known = _tables.setdefault(source, {})
    key = (tokens, chunks.size, chunks.tokens, source._version)
    if key not in known:
        known[key] = _packed(chunks, tokens)
    return known[key]


_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@functools.lru_cache(maxsize=64)
def _dense(batch: int, length: int, size: int, tokens: int, device: torch.device) -> Segments:
    each = -(-length // tokens)
    row = torch.arange(batch, device=device, dtype=torch.int32)[:, None]
    step = torch.arange(each, device=device, dtype=torch.int32)[None]
    begins = torch.nn.functional.pad((row * length + step * tokens).flatten(), (0, 1), value=batch * length)
    slots = (row * -(-length // size) + step * (tokens // size)).flatten()
    first = torch.arange(batch + 1, device=device, dtype=torch.int32) * each
    return Segments(tokens, batch * each, begins, slots.contiguous(), first)


def _packed(chunks: Chunks, tokens: int) -> Segments:
    assert chunks.cu_seqlens is not None and chunks.offsets is not None
    table = packed_chunks(chunks.cu_seqlens, chunks.tokens, tokens)
    assert table.indices is not None and table.offsets is not None
    sequence, step = table.indices.unbind(1)
    owner = sequence.clamp(min=0)
    begins = torch.where(sequence < 0, chunks.tokens, chunks.cu_seqlens[owner] + step * tokens)
    begins = torch.nn.functional.pad(begins.to(torch.int32), (0, 1), value=chunks.tokens)
    slots = (chunks.offsets[owner] + step * (tokens // chunks.size)).to(torch.int32)
    return Segments(tokens, table.count, begins, slots, table.offsets)
