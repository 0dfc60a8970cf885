"""Gradients summed over whoever holds a parameter, and one norm that counts every element once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel.layout import boxes, cuts, record, whole_shape
from pretrain.model.split import Section, Split
from tests.parallel.gradient_ranks import in_half_precision, incomplete, one, poisoned, reduced
from tests.parallel.tensor_ranks import assemble
from tests.ranks import run_ranks

LAYOUTS: list[tuple[str, dict[str, Any], bool]] = [
    # tp, the whole parameters over it, copies of key heads; with what FSDP2 shards
    ("one key head", {"tp": 2, "dp": 2}, True),
    ("two key heads", {"tp": 4}, False),
    ("Mamba-2, one group", {"tp": 2, "dp": 2}, True),
    ("multi-token", {"tp": 2, "dp": 2}, True),
    # experts: on fewer ranks than other parameters, across tp, across dp, and cut besides
    ("ffn moe_softmax", {"dp": 4, "ep": 2}, False),
    ("ffn moe_softmax", {"tp": 2, "dp": 2, "ep": 4}, False),
    ("ffn moe", {"tp": 4, "ep": 2}, False),
    ("ffn moe", {"tp": 2, "dp": 2, "ep": 2, "expert_tensor": True}, False),
]


@pytest.mark.parametrize(("name", "sizes", "sharded"), LAYOUTS, ids=[f"{n}, {s}" for n, s, _ in LAYOUTS])
def test_gradients_and_norm_are_those_of_one_rank(name: str, sizes: dict[str, Any], sharded: bool) -> None:
    ranks = run_ranks(reduced, 4, name, sizes, sharded)
    whole, norm = one(name)
    found, expected = assemble([rank["gradient"] for rank in ranks]), assemble([whole])
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        difference = (found[key] - tensor).abs().max()
        assert difference <= 1e-9 * tensor.abs().max() + 1e-13, f"{key}: {difference:.3g}"
    for rank in ranks:
        assert rank["norm"] == ranks[0]["norm"] == pytest.approx(norm, rel=1e-9)
        assert rank["clipped"] == ranks[0]["clipped"] == pytest.approx(0.1, rel=1e-4)  # the 1e-6 in the divisor


def test_one_number_that_is_not_finite_stops_all_ranks() -> None:
    for norm, untouched in run_ranks(poisoned, 4):
        assert norm == float("inf") and untouched


def test_gradients_that_ranks_disagree_on_are_an_error() -> None:
    messages = run_ranks(incomplete, 2)
    assert messages == ["only some ranks of the stage have a gradient of: norm.weight"] * 2


def test_dtypes_may_differ() -> None:
    for (whole, cut), norm, elements in run_ranks(in_half_precision, 2):
        assert whole.tolist() == [3.0]
        assert len(cut) == 1  # this rank's own
        assert norm > elements**0.5


def test_boxes_of_a_part_along_two_dims() -> None:
    """Experts over ep and their hidden width over tp: [4, 2, 3 + 3] of which this rank has [2, 2, 1 + 1]."""

    class Third:
        def rank(self, axis: str) -> int:
            return {"ep": 1, "tp": 2}[axis]

        def size(self, axis: str) -> int:
            return {"ep": 2, "tp": 3}[axis]

    module = torch.nn.ParameterDict({"w": torch.zeros(2, 2, 2)})
    half = Section.even(3, "hidden")
    record(module, {"w": (Split(0, (Section.even(4, "experts"),), "ep"), Split(2, (half, half)))}, Third())  # type: ignore[arg-type]
    each = cuts(module)["w"]
    assert whole_shape(module["w"], each) == (4, 2, 6)
    assert [(box.local, box.whole, box.sizes) for box in boxes(module["w"], each)] == [
        ((0, 0, 0), (2, 0, 2), (2, 2, 1)),
        ((0, 0, 1), (2, 0, 5), (2, 2, 1)),
    ]
