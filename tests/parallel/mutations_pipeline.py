"""Faults in pipelines: two stages of a model with tied embeddings and a router state that runs along depth."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from tests.parallel.mutations import mutation, replaced, wrapped

Patch = AbstractContextManager[Any]
RUNNER = "parallel.pipeline.runner.PipelineRunner"
BORDER = "pretrain.model.stage._Border"


@mutation("pp=2", "the two copies of the tied embedding keep a gradient each")
def tied_copies_not_summed(rank: int) -> Patch:
    return replaced(f"{RUNNER}.sum_shared_gradients", lambda runner: None)


@mutation("pp=2", "the gradient norm counts the tied embedding in both stages")
def tied_copies_in_the_norm_twice(rank: int) -> Patch:
    return replaced("parallel.engines.pipelined.PipelinedEngine.copies", lambda engine: {})


@mutation("pp=2", "the tied embedding's gradient is summed twice")
def tied_copies_summed_twice(rank: int) -> Patch:
    def wrap(total: Any) -> Any:
        def twice(runner: Any) -> None:
            total(runner)
            total(runner)

        return twice

    return wrapped(f"{RUNNER}.sum_shared_gradients", wrap)


@mutation("pp=2,cut=2+1", "the router state is dropped between stages")
def router_state_dropped(rank: int) -> Patch:
    def wrap(unpack: Any) -> Any:
        def without(border: Any, received: Any) -> Any:
            x, carry = unpack(border, received)
            return x, carry if carry.router_state is None else carry._replace(router_state=carry.router_state * 0.0)

        return without

    return wrapped(f"{BORDER}.unpack", wrap)


@mutation("pp=2,cut=2+1", "the gradient of the router state is dropped between stages")
def router_state_detached(rank: int) -> Patch:
    def wrap(unpack: Any) -> Any:
        def detached(border: Any, received: Any) -> Any:
            x, carry = unpack(border, received)
            state = carry.router_state
            if state is not None:
                state = state.detach() + state * 0.0
            return x, carry._replace(router_state=state)

        return detached

    return wrapped(f"{BORDER}.unpack", wrap)


@mutation("pp=2", "auxiliary losses of the first stage are dropped")
def auxiliary_loss_dropped(rank: int) -> Patch:
    def wrap(unpack: Any) -> Any:
        def without(border: Any, received: Any) -> Any:
            x, carry = unpack(border, received)
            return x, carry if carry.auxiliary is None else carry._replace(auxiliary=carry.auxiliary * 0.0)

        return without

    return wrapped(f"{BORDER}.unpack", wrap)


@mutation("pp=2", "the last stage takes the micro-batches in another order")
def micro_batches_mixed_up(rank: int) -> Patch:
    def wrap(begin: Any) -> Any:
        return lambda stage, batches: begin(stage, batches[::-1] if stage.is_last else batches)

    return wrapped("parallel.pipeline.stage.Stage.begin", wrap)


@mutation("pp=2,pp_schedule=interleaved", "losses are divided by the number of micro-batches once more")
def losses_averaged_by_the_schedule(rank: int) -> Patch:
    def wrap(scaled: Any) -> Any:
        return lambda runner, loss, _: scaled(runner, loss, _) / 4

    return wrapped(f"{RUNNER}._scaled", wrap)


@mutation("pp=2,pp_schedule=zbv", "weight gradients that were put off are forgotten for one micro-batch in two")
def deferred_weight_gradients_forgotten(rank: int) -> Patch:
    calls = iter(range(10**6))

    def wrap(take: Any) -> Any:
        def forgetful(weights: Any) -> Any:
            run = take(weights)
            return run if next(calls) % 2 else lambda: None

        return forgetful

    return wrapped("parallel.pipeline.deferred.WeightGradients.take", wrap)
