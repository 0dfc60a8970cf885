"""Blocks that are gathered and reduced together: FSDP2's answer to a bucket size."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn


def units(
    root: nn.Module, blocks: Sequence[nn.Module], bucket_bytes: int | None, ignored: Collection[nn.Parameter] = ()
) -> list[list[nn.Module]]:
    """Neighbouring blocks joined until the gradients of a unit have at least `bucket_bytes` bytes; each alone for None.

    FSDP2 moves a unit's gradients in one reduce-scatter and its parameters in one all-gather, so a block is the least there is:
    bytes below a block's change nothing, and the last unit may stay smaller. Only blocks of one list join, for these run one
    after the other and all of them in every pass (a head for further tokens is a block, too, and runs in training only).
    ignored: parameters that are not sharded with their block.
    """
    if bucket_bytes is None:
        return [[block] for block in blocks]
    lists = {module: name.rpartition(".")[0] for name, module in root.named_modules()}
    apart = set(ignored)
    found: list[list[nn.Module]] = []
    room, home = 0, None
    for block in blocks:
        size = sum(p.numel() * p.element_size() for p in block.parameters() if p.requires_grad and p not in apart)
        if room <= 0 or lists[block] != home:
            found.append([])
            room, home = bucket_bytes, lists[block]
        found[-1].append(block)
        room -= size
    return found
