"""One pipeline rank of a job: what the stages that it holds cost it in a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from pretrain.estimate import engines
from pretrain.estimate.activations import Activations, activations
from pretrain.estimate.costs import Collective, Matmul, StageCosts
from pretrain.estimate.flops import Forward, Work
from pretrain.estimate.messages import borders, collectives
from pretrain.estimate.model import Kind
from pretrain.estimate.parameters import BYTES, Weighed, join, weigh
from pretrain.estimate.setting import Held, Setting, ends
from pretrain.estimate.update import update_flops
from pretrain.estimate.work import recomputed


class Fixed(NamedTuple):
    """What does not depend on how many micro-batches are under way: the same for pipeline ranks with like stages."""

    state: engines.State
    each: list[Activations]
    work: Work
    matmuls: tuple[Matmul, ...]
    collectives: tuple[Collective, ...]


def costs(setting: Setting, stages: Sequence[Held], flight: Sequence[int]) -> StageCosts:
    """Of a pipeline rank that holds these stages, with so many micro-batches of each under way."""
    alike = tuple((held.kinds, held.first, held.last, borders(setting, held)) for held in stages)
    fixed = setting.once(("costs", alike), lambda: _fixed(setting, stages))
    state, each = fixed.state, fixed.each
    held_back = sum(a.kept * max(0, n - 1) for a, n in zip(each, flight))
    others = sum(a.kept for a, n in zip(each, flight) if n > 0)
    between = sum(a.between for a in each)
    moment = max(max(a.forward, a.backward) + others - a.kept + between - a.between for a in each) + held_back
    gradients = 0.0 if state.growing else state.gradients
    steady = state.weights + state.optimizer
    return StageCosts(
        layers=tuple(held.at + i for held in stages for i in range(len(held.kinds))),
        parameters=state.elements,
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        activations=moment,
        buffers=state.gathered,
        peak=steady + max(gradients + moment + state.gathered, state.gradients + state.scratch),
        flops=fixed.work.useful,
        recomputed=fixed.work.recomputed,
        remade=fixed.work.remade,
        update=fixed.work.update,
        matmuls=fixed.matmuls,
        collectives=fixed.collectives,
    )


def _fixed(setting: Setting, stages: Sequence[Held]) -> Fixed:
    groups: list[engines.Group] = []
    order: list[Weighed] = []
    for held in stages:
        before, after = ends(setting, held)
        if before or after:
            groups.append(engines.Group("around the layers", weigh(before + after, *setting.sharers), 1, True))
        groups += _units(setting, held)
        order += [weigh(before, *setting.sharers), *map(setting.weighed, held.kinds), weigh(after, *setting.sharers)]
    state = engines.state(setting.config, setting.grid, groups, setting.micro_batches)
    each = [work(setting, held) for held in stages]
    return Fixed(
        state,
        [activations(setting, held, state.stays) for held in stages],
        Work(
            useful=sum(one.useful for one in each),
            recomputed=sum(one.recomputed for one in each),
            remade=sum(one.remade for one in each),
            update=_update(setting, stages),
        ),
        tuple(m for held in stages for m in matmuls(setting, held)),
        _merged(collectives(setting, stages, groups, order)),
    )


def _update(setting: Setting, stages: Sequence[Held]) -> float:
    """FLOPs of the optimizer's products, which the ranks of a pipeline stage share out."""
    found = setting.model.matrices((kind for held in stages for kind in held.kinds), any(held.last for held in stages))
    return update_flops(setting.model.optimizer, found, setting.grid.size("dp_cp_tp"), setting.way.gpu)


def _units(setting: Setting, held: Held) -> list[engines.Group]:
    """The layers of a stage as the engine gathers and reduces them: see parallel/engines/units.py."""
    engine = setting.config.engine
    least = engine.bucket_bytes if engine.kind == "torch" else None
    if least is None:
        return [engines.Group(kind.label, setting.weighed(kind), n, False) for kind, n in held.counts.items()]
    joined: list[list[Kind]] = []
    room = 0
    for kind in held.kinds:
        if room <= 0:
            joined.append([])
            room = least
        joined[-1].append(kind)
        room -= BYTES * setting.weighed(kind).whole
    return [
        engines.Group(
            " | ".join(dict.fromkeys(kind.label for kind in unit)), join(map(setting.weighed, unit)), n, False
        )
        for unit, n in Counter(map(tuple, joined)).items()
    ]


def _merged(messages: Iterable[Collective]) -> tuple[Collective, ...]:
    """Messages of one meaning as one, with their mean size."""
    found: dict[tuple[str, str, str], Collective] = {}
    for one in messages:
        key = one.axis, one.op, one.what
        other = found.get(key)
        if other is None:
            found[key] = one
        else:
            calls = one.calls + other.calls
            found[key] = Collective(
                one.axis, one.op, one.what, (one.total + other.total) / calls, calls, one.ranks, one.ranks_in_node, one.hidden
            )  # fmt: skip
    return tuple(found.values())


def work(setting: Setting, held: Held) -> Work:
    """FLOPs of a rank's step in this stage, but for the optimizer's. Every sequence is taken as one document."""
    model, way, length = setting.model, setting.way, setting.length
    share = setting.tokens * setting.micro_batches / setting.grid.tp
    each = [kind.forward(length).times(share * count) for kind, count in held.counts.items()]
    total = Forward.sum([*each, model.after(length).times(share)] if held.last else each)
    again = 0.0
    for kind, count in held.counts.items() if way.recompute != "none" else ():
        measured, rows = setting.measured(kind), ((length, setting.tokens / length),)
        again += count * recomputed(kind, rows, way, measured) * setting.micro_batches
    return Work(useful=total.training, recomputed=again, remade=total.remade)


def matmuls(setting: Setting, held: Held) -> Iterator[Matmul]:
    for kind, count in held.counts.items():
        for product in setting.traced(kind).products(setting.tokens):
            calls = product.count * count * setting.micro_batches
            yield Matmul(f"{kind.label}: {product.what}", product.rows, product.n, product.k, calls)
    if held.last:
        times = 2 if setting.model.extra is not None else 1
        rows = setting.model.vocabulary // setting.grid.tp
        yield Matmul("head", setting.tokens, rows, setting.model.width, times * setting.micro_batches)
