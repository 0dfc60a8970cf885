"""What the ranks of test_context.py do: imported by forked processes, so without pytest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import collectives
from parallel.context import Exchange, apply_context, shard
from pretrain.model.decoder import Decoder
from tests.pretrain.families import build

T = 48  # chunks of 12, 8 and 6 tokens for 2, 3 and 4 ranks
ROWS: dict[str, list[int] | None] = {
    "one document": None,
    # Borders on, one before and one after borders of chunks for every number of ranks; documents of one token; one of 22.
    "many documents": [0, 1, 2, 11, 12, 13, 23, 24, 25, 47, 48],
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
