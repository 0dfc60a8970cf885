"""Faults in tensor parallelism, in the gradient rule, and in the vocabulary that tp shares out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.parallel.mutations import doctored, mutation, replaced, wrapped

Patch = AbstractContextManager[Any]


@mutation("tp=2", "gradients of whole parameters and of shared key heads are not summed over tp")
def whole_parameters_not_summed(rank: int) -> Patch:
    return replaced("parallel.gradients._sum_in_buckets", lambda *arguments: None)


@mutation("tp=2", "each rank keeps its own part of its partial sum instead of everybody's (forward)")
def reduce_scatter_without_the_sum(rank: int) -> Patch:
    def own_part(x: Tensor, dim: int, group: Any) -> Tensor:
        return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].contiguous()

    return replaced("parallel.collectives.scattered", own_part)


@mutation("tp=2", "a key head that two ranks hold gets its gradient twice")
def copies_of_key_heads_counted_twice(rank: int) -> Patch:
    def wrap(reduce: Any) -> Any:
        def doubled(rule: Any) -> None:
            reduce(rule)
            for held, gradient in rule._gradients():
                for box in held.boxes:
                    box.of(gradient).mul_(box.copies)

        return doubled

    return wrapped("parallel.gradients.GradientRule.reduce", wrap)


@mutation("tp=2", "the gradient norm counts a whole parameter once for every rank")
def norm_counts_copies(rank: int) -> Patch:
    def wrap(init: Any) -> Any:
        def made(rule: Any, *args: Any, **options: Any) -> None:
            init(rule, *args, **options)
            rule.held = [held._replace(holders=1.0) for held in rule.held]

        return made

    return wrapped("parallel.gradients.GradientRule.__init__", wrap)


@mutation("tp=2", "each rank clips by the norm of what it holds")
def unequal_clipping(rank: int) -> Patch:
    return replaced("parallel.processes.Processes.sum_", lambda processes, tensor: tensor)


@mutation("tp=2", "rank 1 draws another final norm than rank 0")
def another_initialisation_on_one_rank(rank: int) -> Patch:
    def wrap(reset: Any) -> Any:
        def shifted(model: Any) -> None:
            reset(model)
            with torch.no_grad():
                model.norm.weight.add_(1e-3 * rank)

        return shifted

    return wrapped("pretrain.model.decoder.Decoder.reset_parameters", wrap)


@mutation("tp=2", "rank 1 shrinks its copy of a whole parameter a little more at each step")
def replicas_drift(rank: int) -> Patch:
    def wrap(update: Any) -> Any:
        def drifting(engine: Any, lr: float) -> Any:
            norm = update(engine, lr)
            with torch.no_grad():
                engine.model.norm.weight.mul_(1.0 - 1e-7 * rank)
            return norm

        return drifting

    return wrapped("parallel.engines.torch.TorchEngine.update", wrap)


@mutation("tp=2", "a sum that all parts need (statistics of a norm over all heads) stays each part's own")
def norm_over_own_heads_only(rank: int) -> Patch:
    return replaced("parallel.tensor._across", lambda x, group: x)


@mutation("tp=2", "the gradient of such a sum stays each part's own")
def gradient_of_a_shared_sum_not_summed(rank: int) -> Patch:
    return replaced("parallel.collectives.copy", lambda x, group: x)


@mutation("tp=2", "every part adds the whole bias of an output projection")
def output_bias_added_by_every_part(rank: int) -> Patch:
    return replaced("pretrain.model.split.SharedBias.forward", torch.nn.Linear.forward)


@mutation(
    "tp=2", "softmax over the vocabulary: ranks' sums are added although each has subtracted its own largest logit"
)
def largest_logit_not_shared(rank: int) -> Patch:
    def merge(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return parts[:, 0].amax(0) + parts[:, 1].sum(0).log(), parts[:, 2].sum(0), parts[:, 3].sum(0)

    return replaced("kernels.cross_entropy.logits.merge", merge)


@mutation("tp=2", "each rank takes its rows of the vocabulary for the next one's when it looks for targets")
def target_offset_of_another_rank(rank: int) -> Patch:
    shifted = lambda group: (dist.get_rank(group) + 1) % dist.get_world_size(group)  # noqa: E731
    return doctored("parallel.vocabulary", get_rank=shifted)


@mutation("tp=2", "embedding: a rank adds its first row for tokens that it does not have")
def absent_tokens_not_masked(rank: int) -> Patch:
    from parallel.collectives import reduce_scatter

    def forward(table: Any, tokens: Tensor) -> Tensor:
        own = (tokens - table.first).clamp(0, table.weight.shape[0] - 1)
        return reduce_scatter(torch.nn.functional.embedding(own, table.weight), 1, table.group)

    return replaced("parallel.vocabulary.VocabularyEmbedding.forward", forward)


@mutation("tp=2", "auxiliary losses count once for every tp rank")
def auxiliary_loss_counted_by_every_rank(rank: int) -> Patch:
    from pretrain.model.sublayer import Carry

    return wrapped(
        "pretrain.model.sublayer.Carry.add",
        lambda add: lambda carry, loss: add(carry, 2 * loss) if isinstance(carry, Carry) else None,
    )


@mutation("tp=2", "sparse layers on rank 1 take their tokens for those of rank 0 (which document a token is in)")
def tokens_of_another_slice(rank: int) -> Patch:
    def wrap(hook: Any) -> Any:
        return lambda module, args, rank, group: hook(module, args, rank=0, group=group)

    return wrapped("parallel.tensor._slice_sequence", wrap)


@mutation("tp=2", "on rank 1 the bias that balances experts stays as it was")
def stale_expert_bias(rank: int) -> Patch:
    def forget(router: Any, load: Tensor) -> None:
        router.load.zero_()

    return replaced("pretrain.model.router.Router.rebalance", forget) if rank == 1 else nullcontext()


@mutation("tp=2", "queries, keys and values cut in two as one block, not section by section")
def sections_cut_as_one(rank: int) -> Patch:
    def take(split: Any, whole: Tensor, rank: int, ranks: int) -> Tensor:
        sizes = [piece.length for piece in split.pieces(rank, ranks)]
        start = min(rank * sum(sizes), whole.shape[split.dim] - sum(sizes))
        return whole.narrow(split.dim, start, sum(sizes)).clone()

    return replaced("pretrain.model.split.Split.take", take)


@mutation("dp=2,tp=2 of 4", "whole parameters are summed over dp, but not over tp")
def one_of_two_sums_left_out(rank: int) -> Patch:
    return replaced("parallel.gradients._sum_in_buckets", lambda *arguments: None)
