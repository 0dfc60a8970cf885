"""What the ranks of test_context.py do: imported by forked processes, so without pytest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import attention
from parallel import collectives
from parallel.context import Exchange, apply_context, ring, shard
from pretrain.model.decoder import Decoder
from tests.pretrain.families import build

T = 48  # chunks of 12, 8 and 6 tokens for 2, 3 and 4 ranks
ROWS: dict[str, list[int] | None] = {
    "one document": None,
    # Borders on, one before and one after borders of chunks for every number of ranks; documents of one token; one that has a
    # single token before a border.
    "many documents": [0, 1, 2, 11, 12, 13, 23, 24, 25, 35, 47, 48],
    "long and empty ones": [0, 0, 5, 5, 36, 48, 48],
}


@dataclass
class AllRanks:
    """A mesh of which cp is the only axis."""

    ranks: int
    own: int

    def size(self, axis: str) -> int:
        return self.ranks

    def rank(self, axis: str) -> int:
        return self.own

    def group(self, axis: str) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.ranks > 1 else None


def model_of(family: str, dtype: torch.dtype) -> Decoder:
    return build(family, init_std=0.3).to(dtype).train()


def row_of(name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """tokens and targets [1, T], cu_seqlens; some tokens have no target."""
    tokens = torch.randint(0, 256, (1, T), generator=torch.Generator().manual_seed(7))
    targets = tokens.roll(-1, dims=1)
    targets[:, [3, 20, 47]] = -100
    borders = ROWS[name]
    return tokens, targets, None if borders is None else torch.tensor(borders, dtype=torch.int32)


def measure(model: Decoder, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> dict[str, Tensor]:
    """logits, loss and the gradients by name."""
    model.zero_grad()
    with torch.no_grad():
        logits = model(tokens, cu_seqlens=cu_seqlens)
    loss = model(tokens, targets=targets, cu_seqlens=cu_seqlens)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits, "loss": loss.detach(), **gradients}


def on_ranks(
    rank: int, world: int, families: list[str], rows: list[str], dtype: torch.dtype, exchange: Exchange = "gather"
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """This rank's logits, and the sums over ranks of loss and gradients."""
    results = {}
    group = dist.group.WORLD
    assert group is not None
    for family in families:
        model = model_of(family, dtype)
        apply_context(model, AllRanks(world, rank), exchange)
        for module in model.modules():
            if hasattr(module, "reduce_load"):
                module.reduce_load = lambda load: collectives.summed(load, group)
        for name in rows:
            tokens, targets, cu_seqlens = row_of(name)
            measured = measure(model, shard(tokens, world, rank), shard(targets, world, rank), cu_seqlens)
            results[family, name] = {
                key: value if key == "logits" else collectives.summed(value, group) for key, value in measured.items()
            }
    return results


def in_bf16(rank: int, world: int, families: list[str]) -> dict[str, dict[str, Tensor]]:
    """As on_ranks, for the row of many documents, with fp32 weights under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        results = on_ranks(rank, world, families, ["many documents"], torch.float32)
    return {family: result for (family, _), result in results.items()}


def queries_keys_values() -> tuple[Tensor, Tensor, Tensor]:
    """q [1, T, 4, 6], k [1, T, 2, 6], v [1, T, 2, 5]."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((4, 6), (2, 6), (2, 5))
    q, k, v = (torch.randn(1, T, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def attended(
    rank: int, world: int, rows: list[str], windows: list[int | None]
) -> dict[tuple[str, str, int | None], list[Tensor]]:
    """This rank's part of the output, and of the gradients of q, k and v, under either exchange; None: without ranks."""
    ring.SCORES = 4 * 6 * 5  # tiles of 5 queries over chunks of 6 tokens, of 2 over 12
    results = {}
    for exchange in ("gather", "ring") if world > 1 else ("gather",):
        holder = torch.nn.Module()
        holder.sequence_of = build("mixer attention").sequence_of
        apply_context(holder, AllRanks(world, rank), exchange)
        for name in rows:
            tokens, _, cu_seqlens = row_of(name)
            sequence = holder.sequence_of(shard(tokens, world, rank) if world > 1 else tokens, cu_seqlens)
            for window in windows:
                whole = queries_keys_values()
                q, k, v = (shard(x, world, rank).requires_grad_() for x in whole)
                o = sequence.attend(q, k, v, scale=0.7, window=window)
                (o * o.detach().sin()).sum().backward()
                results[name, exchange, window] = [x for x in (o.detach(), q.grad, k.grad, v.grad) if x is not None]
    return results


def attended_alone(name: str, window: int | None) -> list[Tensor]:
    _, _, cu_seqlens = row_of(name)
    q, k, v = (x.requires_grad_() for x in queries_keys_values())
    o = attention(q, k, v, scale=0.7, window=window, cu_seqlens=cu_seqlens)
    (o * o.detach().sin()).sum().backward()
    return [x for x in (o.detach(), q.grad, k.grad, v.grad) if x is not None]


def refused(rank: int, world: int) -> list[str]:
    """What a cut model says to input that it cannot take."""
    model = model_of("mixer conv_attention", torch.float32)
    apply_context(model, AllRanks(world, rank))
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    calls = (
        lambda: model(tokens.view(2, 4)),
        lambda: model(tokens, cu_seqlens=torch.tensor([0, 8], dtype=torch.int32)),
        lambda: model(tokens[:, :7]),
        lambda: model(tokens[:, :2]),
        lambda: model(tokens, cache=model.new_cache()),
        lambda: model.sequence_of(tokens, None, 3),
        lambda: model.sequence_of(tokens, None).recur(attention, tokens),
    )
    texts = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            texts.append(str(error))
    return texts
