"""Generation in fixed buffers: every token runs the same operations on the same memory, so that a CUDA graph can replay them.

The caches that a prompt has filled grow no further: keys and values get room for all tokens to come (a window's for as many as it
sees, in a ring), and every other memory is overwritten in place. Where a token stands is a number on the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pretrain.model.cache import BY_TOKEN, DecoderCache
from pretrain.model.decoder import Decoder
from pretrain.model.sequence import Cache, SequenceContext

WARM = 3  # steps before a capture, in which libraries choose and compile their kernels


def objection(model: Decoder) -> str | None:
    """Why a model cannot generate in fixed buffers, or None."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "its layers are brought to the device one at a time"
    for part in model.sublayers():
        if not part.fixed_memory:
            return f"{type(part).__name__} remembers more with every token, or as much as its router says"
    return None


@dataclass
class FixedSequence(SequenceContext):
    """One token a row. position: int64 [1], of this token. room: tokens that fit. held: buffers, by a layer's cache and name."""

    position: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    room: int = 0
    seen: int = 0
    held: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        cache: Cache = None,
    ) -> Tensor:
        """As SequenceContext.attend for T = 1. The scores of what is not there yet are masked.

        Without a cache, k and v are what `extend` has returned.
        """
        slots = self.room if window is None else min(window, self.room)
        if cache is not None:
            k, v = self._write(k, cache, "k", slots), self._write(v, cache, "v", slots)
        visible = torch.arange(slots, device=q.device) <= self.position  # all of a ring that has come round
        # The heads that share keys as rows of one query: nothing is copied for them.
        grouped = q[:, 0].unflatten(1, (k.shape[2], -1))
        with torch.autocast(q.device.type, enabled=False):
            o = scaled_dot_product_attention(
                grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible[None, None, None], scale=scale
            )
        return o.flatten(1, 2)[:, None]

    def extend(self, x: Tensor, cache: Cache, name: str) -> Tensor:
        """All of the buffer [B, room, ...], of which the places after this token hold nothing yet; for `attend`."""
        assert cache is not None
        return self._write(x, cache, name, self.room)

    def _write(self, x: Tensor, cache: dict[str, Any], name: str, slots: int) -> Tensor:
        """Puts x [B, 1, ...] in its place in the layer's buffer [B, slots, ...], which it returns."""
        key = (id(cache), name)
        if key not in self.held:
            cache[name] = self.held[key] = _with_room(cache[name], slots, self.seen)
        return self.held[key].index_copy_(1, self.position % slots, x)


def _with_room(held: Tensor, slots: int, seen: int) -> Tensor:
    """held [B, L, ...], of the last L of `seen` tokens -> [B, slots, ...], each token in the slot of its position."""
    buffer = held.new_zeros(held.shape[0], slots, *held.shape[2:])
    L = min(held.shape[1], slots)
    place = torch.arange(seen - L, seen, device=held.device) % slots
    return buffer.index_copy_(1, place, held[:, held.shape[1] - L :])


class FixedDecoding:
    """Goes on after a prompt. Call it with one token a row."""

    def __init__(self, model: Decoder, cache: DecoderCache, rows: int, tokens: int, capture: bool = False):
        """cache: filled by the prompt; taken over. tokens: how many may come. capture: into a CUDA graph, on a CUDA device.

        Raises ValueError for a model that cannot, see `objection`.
        """
        reason = objection(model)
        if reason is not None:
            raise ValueError(f"no generation in fixed buffers: {reason}")
        device = model.embedding.weight.device
        self.model, self.cache, self.capture = model, cache, capture
        self.room, self.seen = cache.length + tokens, cache.length
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.position = torch.tensor([cache.length], device=device)
        self.held: dict[tuple[int, str], Tensor] = {}
        self.logits: Tensor | None = None
        self.graph: Any = None
        self.steps = 0
        self.buffers: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        for layer in cache.layers:
            for part in (layer.mixer, layer.ffn):
                own = {name: value.clone() for name, value in part.items() if name not in BY_TOKEN}
                part.update(own)
                self.buffers.append((part, own))

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, 1] -> logits fp32 [B, vocabulary] of what comes after them; overwritten by the next call."""
        assert self.cache.length < self.room, "more tokens than there is room for"
        self.tokens.copy_(tokens)
        self.steps += 1
        if self.capture and self.graph is None and self.steps > WARM:
            self.graph = self._captured()
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()
        self.cache.length = self.seen + self.steps
        assert self.logits is not None
        return self.logits

    def _captured(self) -> Any:
        """A graph of one step, which has been recorded and not computed; None where something in it waits for the device."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            self.capture = False
            warnings.warn(
                f"generation goes on without a CUDA graph: {' '.join(str(error).split())[:200]}", stacklevel=3
            )
            return None
        return graph

    def _step(self) -> None:
        before: Callable[..., SequenceContext] = self.model.sequence_of
        self.model.sequence_of = self._sequence
        try:
            logits = self.model(self.tokens, cache=self.cache, last_only=True)[:, -1]
        finally:
            self.model.sequence_of = before
        for part, own in self.buffers:
            for name, buffer in own.items():
                if part[name] is not buffer:
                    buffer.copy_(part[name])
                    part[name] = buffer
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)
        self.position += 1

    def _sequence(self, tokens: Tensor, cu_seqlens: Tensor | None, offset: int = 0) -> SequenceContext:
        return FixedSequence(
            self.position.expand(tokens.shape), position=self.position, room=self.room, seen=self.seen, held=self.held
        )
