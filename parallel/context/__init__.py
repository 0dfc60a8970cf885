"""Context parallelism: one packed row over several ranks, for every mixer that reaches along it through its sequence context.

    check_context(model, mesh.size("cp"), tokens)       before any process group: can this model's rows be cut?
    apply_context(model, mesh)                           from here on the model takes shards of rows
    loss = model(shard(tokens, cp, rank), targets=shard(targets, cp, rank), cu_seqlens=cu_seqlens)    cu_seqlens of the whole row

The loss is the sum over this rank's tokens; the sum over the ranks of cp is the row's, and so are their gradients'.
Sources: zig-zag chunks and gathered keys: Llama 3 (arXiv:2407.21783, section 3.3.2); ring: Liu et al. 2023 (arXiv:2310.01889);
states: LASP-2 (arXiv:2502.07563).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn

from parallel.context.cut import Cut, check_length, check_reach, cut_batch, shard, unshard
from parallel.context.sequence import CutSequence, Exchange

__all__ = ["Cut", "CutSequence", "Exchange", "apply_context", "check_context", "cut_batch", "shard", "unshard"]


class Axes(Protocol):
    """What is asked of a mesh."""

    def size(self, axis: str) -> int: ...

    def rank(self, axis: str) -> int: ...

    def group(self, axis: str) -> dist.ProcessGroup | None: ...


def check_context(model: nn.Module, ranks: int, tokens: int | None = None) -> None:
    """Raises ValueError where rows (of `tokens` tokens) of this model cannot be cut over `ranks`. Needs no processes.

    A module that must have whole sequences says why in its attribute `whole_sequence`; None or no such attribute: it need not.
    One whose convolutions look back says how many tokens in `reach`.
    """
    if ranks == 1:
        return
    if tokens is not None:
        check_length(tokens, ranks)
    for name, module in model.named_modules():
        reason = getattr(module, "whole_sequence", None)
        if reason:
            raise ValueError(
                f"mesh.cp={ranks}: {name} ({type(module).__name__}) needs whole sequences: {reason}; use mesh.cp=1"
            )
        if tokens is not None:
            check_reach(getattr(module, "reach", 0), tokens, ranks)


def apply_context(model: nn.Module, mesh: Axes, exchange: Exchange | None = None) -> None:
    """Makes the model take its rank's shard of each row, through its attribute `sequence_of`. Nothing happens where cp is 1.

    exchange: how attention reaches earlier keys; by default what the mesh's configuration says (mesh.context).
    Raises ValueError for a model that cannot be cut.
    """
    ranks, rank, group = mesh.size("cp"), mesh.rank("cp"), mesh.group("cp")
    check_context(model, ranks)
    if group is None:
        return
    plain_of: Any = model.sequence_of
    chosen: Exchange = getattr(mesh, "context", "gather") if exchange is None else exchange

    # cu_seqlens is read on the host. Where it lies on an accelerator, that waits for the device once a forward pass.
    def sequence_of(tokens: Tensor, cu_seqlens: Tensor | None, offset: int = 0) -> CutSequence:
        """tokens [1, T / ranks]; cu_seqlens: borders in the whole row of T tokens, None for one document."""
        if offset:
            raise ValueError("context parallelism is for training, where nothing is cached; generate with mesh.cp=1")
        if tokens.shape[0] != 1:
            raise ValueError(
                f"tokens has {tokens.shape[0]} rows, context parallelism cuts a single packed one; flatten them to [1, B*T] "
                "with cu_seqlens before they are cut"
            )
        cut = Cut.of(ranks, rank, tokens.shape[1] * ranks, cu_seqlens)
        return CutSequence(plain_of(tokens, cut.local().to(tokens.device)), cut, group, chosen)

    model.sequence_of = sequence_of  # type: ignore[assignment]  # an attribute that torch's Module does not know
