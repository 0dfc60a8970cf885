"""What every launch of a call of the delta rule needs to know."""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton
from torch import Tensor

from kernels.common.chunks import Chunks, dense_chunks, packed_chunks
from kernels.common.segments import Segments, segments_of
from kernels.common.tiles import descriptors_pay
from kernels.delta_rule.triton_launch import chunk_size, v_tile
from kernels.delta_rule.triton_segments import segment_tokens


@dataclass(frozen=True)
class Shape:
    """What every launch of a call needs to know."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    gate: int  # 0 none, 1 one a head, 2 one a channel
    chunks: Chunks
    scale: float

    descriptors: bool  # tiles are read through tensor descriptors
    segments: Segments | None = None

    @property
    def BK(self) -> int:
        """K filled up to a tile."""
        return triton.next_power_of_2(max(self.K, 16))

    def tile(self, heads: int, *dims: int) -> tuple[int, ...]:
        return (self.chunks.count, heads, *dims)

    @property
    def keys(self) -> dict[str, int]:
        """What a tuning table may ask about."""
        return {"K": self.K, "V": self.V, "gate": self.gate, "T": self.T, "heads": self.chunks.sequences * self.HV}


def shape_of(q: Tensor, v: Tensor, g: Tensor | None, scale: float, cu_seqlens: Tensor | None) -> Shape:
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    gate = 0 if g is None else g.dim() - 2
    size = chunk_size(T, K, q, gate)
    chunks = dense_chunks(B, T, size) if cu_seqlens is None else packed_chunks(cu_seqlens, T, size)
    s = Shape(B, T, H, HV, K, V, gate, chunks, scale, descriptors_pay(q.device))
    _, block, _ = v_tile("delta_rule_scan_forward", q, descriptors=s.descriptors, **s.keys)
    tokens = segment_tokens(q, T, size, K, chunks.sequences * HV, triton.cdiv(V, block))
    if tokens:
        s = replace(s, segments=segments_of(chunks, cu_seqlens, tokens, q.device))
    return s


@dataclass(frozen=True)
class Spans:
    """What a scan walks: sequences, or segments of them."""

    count: int
    begins: Tensor | None
    slots: Tensor | None


def spans(s: Shape) -> Spans:
    if s.segments is not None:
        return Spans(s.segments.count, s.segments.begins, s.segments.slots)
    return Spans(s.chunks.sequences, s.chunks.cu_seqlens, s.chunks.offsets)
