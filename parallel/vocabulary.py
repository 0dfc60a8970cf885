"""The vocabulary shared out over tensor-parallel ranks: embedding, logits and loss without all rows of the table anywhere.

    embedding   each rank looks up the tokens that it has rows for; the sum over ranks is reduce-scattered along T
    loss        each rank computes the logits of its own rows, a chunk of tokens at a time; ranks exchange, per token, only four
                numbers, at once: the largest logit, the sum of exponentials, the target's logit and the sum of all (after
                Shoeybi et al., arXiv 1909.08053, section 3)

Ranks hold T / tp tokens of each row between sublayers (sequence parallelism); positions are those of rank 0 first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kernels.cross_entropy import Shard, Terms, token_losses
from kernels.cross_entropy.chunked import add_product, default_chunk, scaled
from parallel.collectives import all_gather, gathered, reduce_scatter, scattered


class VocabularyEmbedding(nn.Module):
    """tokens int64 [B, T] -> this rank's slice along T of their embeddings, [B, T / tp, D].

    weight: this rank's rows of the table, [vocabulary / tp, D].
    """

    def __init__(self, whole: nn.Embedding, rows: Tensor, rank: int, group: dist.ProcessGroup):
        super().__init__()
        self.num_embeddings, self.embedding_dim = whole.num_embeddings, whole.embedding_dim
        self.weight = nn.Parameter(rows, whole.weight.requires_grad)
        self.first, self.group = rank * rows.shape[0], group

    def forward(self, tokens: Tensor) -> Tensor:
        check_length(tokens.shape[1], dist.get_world_size(self.group))
        own = tokens - self.first
        absent = (own < 0) | (own >= self.weight.shape[0])
        found = functional.embedding(own.masked_fill(absent, 0), self.weight)
        return reduce_scatter(found.masked_fill(absent[..., None], 0.0), 1, self.group)


class VocabularyReadout:
    """Logits and loss from this rank's tokens and its rows of the head; see pretrain/model/readout.py for what they replace."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def logits(self, x: Tensor, weight: Tensor, last_only: bool) -> Tensor:
        """x [B, T / tp, D], weight [vocabulary / tp, D] -> all logits fp32 [B, T or 1, vocabulary], the same on all ranks."""
        x = all_gather(x[:, -1:] if last_only else x, 1, self.group)
        return all_gather(functional.linear(x[:, -1:] if last_only else x, weight).float(), 2, self.group)

    def loss(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """x [B, T / tp, D], weight [vocabulary / tp, D], targets [B, T] -> the sum over this rank's own tokens, fp32 scalar."""
        return vocabulary_cross_entropy(x, weight, targets, self.group)


def check_length(T: int, ranks: int) -> None:
    """Raises ValueError unless T tokens can be shared out evenly."""
    if T % ranks:
        raise ValueError(
            f"a row of {T} tokens on this rank cannot be cut over mesh.tp={ranks}, which shares out the tokens between "
            f"sublayers; choose a length that is a multiple of {ranks} (with context parallelism, on every rank of it)"
        )


def vocabulary_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """`kernels.linear_cross_entropy` with reduction "sum", of a head whose rows are shared out over the group in rank order.

    x: [B, T / ranks, D], this rank's tokens. weight: [vocabulary / ranks, D], this rank's rows. targets: int64 [B, T], the same
    on all ranks. chunk: tokens, of all ranks together, whose logits are held at a time.

    Returns the sum of the losses of this rank's own tokens, fp32 (fp64 for fp64 x): over the ranks these add up to the whole.
    Gradients are those of the ranks' sum, for which all ranks must scale their losses alike. Collective, forward and backward.
    Raises ValueError for a target that no rank has a row for (on a CPU only: reading targets on a GPU would stall it).
    """
    ranks = dist.get_world_size(group)
    B, part, _ = x.shape
    assert targets.shape == (B, part * ranks), (targets.shape, x.shape)
    _check_targets(targets, weight.shape[0] * ranks, ignore_index)
    # [ranks, B * T / ranks]: the targets in the order in which gathering brings the tokens.
    of_ranks = targets.unflatten(1, (ranks, part)).transpose(0, 1).reshape(ranks, -1)
    options = (ignore_index, z_loss, label_smoothing, chunk or default_chunk(targets.numel(), weight.shape[0]))
    with torch.autocast(x.device.type, enabled=False):
        return _apply(x.flatten(0, 1), weight, of_ranks, group, options, torch.is_grad_enabled())


class _Loss(torch.autograd.Function):
    """All tokens' upstream gradients are one number, so the forward computes the gradients up to it; the backward scales."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        group: dist.ProcessGroup,
        options: tuple[int, float, float, int],
        learn: bool,
    ) -> Tensor:
        ignore_index, z_loss, smooth, chunk = options
        terms = Terms(z_loss, smooth)
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        wide = torch.promote_types(x.dtype, torch.float32)
        low = weight.to(x.dtype)
        dx = torch.empty_like(x) if learn and ctx.needs_input_grad[0] else None
        dw = torch.zeros(weight.shape, dtype=wide, device=x.device) if learn and ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=wide, device=x.device)
        step = max(1, chunk // ranks)
        shard = Shard(rank * weight.shape[0], ranks * weight.shape[0], lambda parts: gathered(parts, 0, group))
        logits: Tensor | None = None  # of one chunk, whose memory all of them use
        for a in range(0, x.shape[0], step):
            rows = gathered(x[a : a + step], 0, group)  # rank 0's tokens, then rank 1's, ...
            if logits is None:
                logits = torch.empty(rows.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
            aims = targets[:, a : a + step].flatten()
            kept = aims != ignore_index
            z = torch.mm(rows, low.T, out=logits[: rows.shape[0]])
            losses = token_losses(z, aims.where(kept, 0), kept.to(wide), terms, learn=learn, shard=shard)
            total += losses.masked_fill(~kept, 0.0).unflatten(0, (ranks, -1))[rank].sum()
            if dx is not None:
                dx[a : a + step] = scattered(z @ low, 0, group)
            if dw is not None:
                add_product(dw, z, rows)
        ctx.save_for_backward(dx, dw)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        dx = None if dx is None else scaled(dx, upstream).to(dx.dtype)
        dw = None if dw is None else scaled(dw, upstream).to(ctx.dtype)
        return dx, dw, None, None, None, None


def _apply(*args: Any) -> Tensor:
    loss: Tensor = _Loss.apply(*args)
    return loss


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    if targets.device.type != "cpu":
        return
    wrong = targets[((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"a target is {int(wrong[0])}: neither a token (0..{vocabulary - 1}) nor ignore_index={ignore_index}"
        )
