"""The equivalence gate notices deliberate faults: a reduction left out, a gradient counted twice, a state not passed on ..."""

from __future__ import annotations

import pytest

from tests.parallel.mutation_ranks import CLEAN, kills, table
from tests.parallel.mutations import MUTATIONS, Mutation


def caught(mutations: list[Mutation]) -> None:
    found = kills(mutations)
    print(table(found))
    assert [kill.layout for kill in found if kill.name == CLEAN and kill.faults] == []
    assert [kill.name for kill in found if kill.name != CLEAN and not kill.faults] == []
    assert {kill.name for kill in found} - {CLEAN} == {mutation.name for mutation in mutations}


def test_every_fault_on_two_ranks_is_caught() -> None:
    caught([mutation for mutation in MUTATIONS if mutation.world == 2])


def test_every_fault_on_four_ranks_is_caught() -> None:
    caught([mutation for mutation in MUTATIONS if mutation.world == 4])


def test_mutations_have_names_of_their_own() -> None:
    assert len(MUTATIONS) >= 20
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize(
    "axis", ["tp=", "cp=", "context=ring", "dp=", "replicate=", "ep=", "pp=", "interleaved", "zbv"]
)
def test_every_axis_has_mutations(axis: str) -> None:
    assert any(axis in mutation.layout for mutation in MUTATIONS)
