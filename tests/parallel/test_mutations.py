"""The equivalence gate notices deliberate faults: a reduction left out, a gradient counted twice, a state not passed on ..."""

from __future__ import annotations

import random

import pytest

from tests.parallel.mutation_ranks import CLEAN, kills, table
from tests.parallel.mutations import MUTATIONS, Mutation


def caught(mutations: list[Mutation]) -> None:
    found = kills(mutations)
    print(table(found))
    assert [kill.layout for kill in found if kill.name == CLEAN and kill.faults] == []
    assert [kill.name for kill in found if kill.name != CLEAN and not kill.faults] == []
    assert {kill.name for kill in found} - {CLEAN} == {mutation.name for mutation in mutations}


def drawn(seed: int = 0) -> list[Mutation]:
    """Of the faults of each layout and model, a quarter, and one at least: always the same ones."""
    found = []
    for place in dict.fromkeys((mutation.layout, mutation.model) for mutation in MUTATIONS):
        alike = [mutation for mutation in MUTATIONS if (mutation.layout, mutation.model) == place]
        found += random.Random(f"{place} {seed}").sample(alike, -(-len(alike) // 4))
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_a_slice_of_the_faults_is_caught(world: int) -> None:
    caught([mutation for mutation in drawn() if mutation.world == world])


@pytest.mark.campaign
@pytest.mark.parametrize("world", [2, 4])
def test_every_fault_is_caught(world: int) -> None:
    caught([mutation for mutation in MUTATIONS if mutation.world == world])


def test_mutations_have_names_of_their_own() -> None:
    assert len(MUTATIONS) >= 20
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize(
    "axis", ["tp=", "cp=", "context=ring", "dp=", "replicate=", "ep=", "pp=", "interleaved", "zbv"]
)
def test_every_axis_has_mutations(axis: str) -> None:
    assert any(axis in mutation.layout for mutation in MUTATIONS)
