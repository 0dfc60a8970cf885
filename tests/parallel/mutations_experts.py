"""Faults in data and expert parallelism, and in the balancing of experts."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from tests.parallel.mutations import mutation, replaced, wrapped

Patch = AbstractContextManager[Any]


@mutation("dp=2", "gradients are averaged over data-parallel ranks instead of summed")
def gradients_averaged(rank: int) -> Patch:
    def wrap(set_factor: Any) -> Any:
        return lambda module, factor: set_factor(module, 2.0)

    return wrapped("torch.distributed.fsdp.FSDPModule.set_gradient_divide_factor", wrap)


@mutation("dp=2,replicate=2", "replicas do not sum their gradients")
def replicas_not_summed(rank: int) -> Patch:
    return replaced("parallel.engines.torch.sum_gradients", lambda *arguments: None)


@mutation("dp=2", "each rank divides by its own number of targets")
def loss_per_own_target(rank: int) -> Patch:
    def wrap(forward_backward: Any) -> Any:
        def local(engine: Any, batches: Any, denominator: float, *args: Any) -> Any:
            own = sum(int((batch.targets >= 0).sum()) for batch in batches)
            return forward_backward(engine, batches, 2.0 * own, *args)

        return local

    return wrapped("parallel.engines.base.Engine.forward_backward", wrap)


@mutation("dp=2", "gradients are reduced after the first micro-batch only")
def second_micro_batch_not_reduced(rank: int) -> Patch:
    def wrap(backward: Any) -> Any:
        def first_only(engine: Any, loss: Tensor, last: bool) -> None:
            backward(engine, loss * 0.0 if last else loss, True)

        return first_only

    return wrapped("parallel.engines.torch.TorchEngine.backward", wrap)


@mutation("dp=2", "balancing sees the loads of the rank's own tokens only")
def loads_not_summed(rank: int) -> Patch:
    return replaced("pretrain.train.balance.stage_sum", lambda mesh: lambda load: load.clone())


@mutation("dp=2", "the balancing loss sees the loads of the rank's own tokens only")
def balancing_loss_of_own_loads(rank: int) -> Patch:
    return replaced("pretrain.train.layout.share_loads", lambda model, mesh: None)


@mutation("dp=2", "balancing is told half of every load")
def half_of_the_load_lost(rank: int) -> Patch:
    def wrap(total: Any) -> Any:
        def fewer(mesh: Any) -> Any:
            summed = total(mesh)
            return lambda load: summed(load) // 2

        return fewer

    return wrapped("pretrain.train.balance.stage_sum", wrap)


def _scale_experts(factor: float) -> Patch:
    def wrap(reduce: Any) -> Any:
        def scaled(rule: Any) -> None:
            reduce(rule)
            for held, gradient in rule._gradients():
                if any(cut.axis == "ep" for cut in held.cuts):
                    gradient.mul_(factor)

        return scaled

    return wrapped("parallel.gradients.GradientRule.reduce", wrap)


@mutation("dp=2,ep=2", "gradients of experts are scaled by ep")
def expert_gradients_times_ep(rank: int) -> Patch:
    return _scale_experts(2.0)


@mutation("dp=2,ep=2", "gradients of experts are averaged over the ranks whose tokens they saw")
def expert_gradients_averaged(rank: int) -> Patch:
    return _scale_experts(0.5)


@mutation("dp=2,ep=2", "sizes of the messages to the two ranks are swapped: tokens meet other experts")
def split_sizes_swapped(rank: int) -> Patch:
    def wrap(load: Any) -> Any:
        return lambda indices, experts: load(indices, experts).view(2, -1).flip(0).flatten()

    return wrapped("parallel.expert.dispatch.load", wrap)


@mutation("dp=2,ep=2", "each rank holds the experts of the other one")
def experts_of_another_rank(rank: int) -> Patch:
    def part(whole: Tensor, splits: Any, mesh: Any) -> Tensor:
        for split in splits:
            ranks = mesh.size(split.axis)
            whole = split.take(whole.detach(), (mesh.rank(split.axis) + 1) % ranks, ranks)
        return whole

    return replaced("parallel.expert.apply._part", part)


@mutation("dp=2,ep=2", "gradients of tokens that went to other ranks are left there")
def gradients_of_travelled_tokens_dropped(rank: int) -> Patch:
    def wrap(backward: Any) -> Any:
        def dropped(ctx: Any, ticket: Tensor) -> Any:
            nothing, tokens, weights = backward(ctx, ticket)
            group = ctx.trip.transport.group
            send = ctx.trip.transport.send
            start = sum(send[: dist.get_rank(group)])
            stayed = tokens.new_zeros(tokens.shape)
            own = slice(start, start + send[dist.get_rank(group)])
            stayed[own] = tokens[own]
            return nothing, stayed, weights

        return staticmethod(dropped)

    return wrapped("parallel.expert.travel._Depart.backward", wrap)


@mutation("dp=2,ep=2", "scores do not travel with their tokens: experts weigh all choices alike")
def scores_stay_at_home(rank: int) -> Patch:
    def wrap(init: Any) -> Any:
        return lambda trip, transport, tokens, weights: init(trip, transport, tokens, weights * 0 + 0.5)

    return wrapped("parallel.expert.travel.Trip.__init__", wrap)


@mutation("dp=4,ep=2 of 4", "experts are not summed over the ranks that hold the same ones")
def experts_not_summed_over_edp(rank: int) -> Patch:
    def wrap(total: Any) -> Any:
        def fewer(tensors: Any, group: Any, bucket: int) -> None:
            if group is None or dist.get_world_size(group) != 2:
                total(tensors, group, bucket)

        return fewer

    return wrapped("parallel.gradients._sum_in_buckets", wrap)
