"""The lists of deliberate faults keep up with the code: each can still be put in, and its test is still there."""

from __future__ import annotations

import ast

import pytest

from tests.faults.mutations import ROOT, Mutant, applied, mutants


@pytest.mark.parametrize("mutant", mutants(), ids=lambda mutant: mutant.name)
def test_a_mutant_fits_the_code(mutant: Mutant) -> None:
    text = (ROOT / mutant.path).read_text()
    changed = applied(mutant, text)
    assert changed != text
    ast.parse(changed)
    file, _, rest = mutant.test.partition("::")
    names = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)}
    assert rest.partition("[")[0] in names
