"""How parameters are cut: the arithmetic of pieces, parts that add up to the whole, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from parallel.tensor import check_tensor, units
from pretrain.model.decoder import AnyFFN, AnyMixer, Decoder
from pretrain.model.ffns.glu import GLU
from pretrain.model.sequence import SequenceContext
from pretrain.model.split import Piece, Section, SharedBias, Split
from pretrain.model.sublayer import Carry, ContextualFFN, Mixer
from tests.parallel.tensor_ranks import WIDER
from tests.pretrain.families import FAMILIES, FFNS, MIXERS, build

Q, KV = Section(16, 4, "heads"), Section(8, 2, "kv_heads", shared=True)


def test_sections_are_cut_each_by_itself() -> None:
    split = Split(0, (Q, KV, KV))
    assert split.whole() == 32
    assert split.pieces(0, 2) == [Piece(0, 0, 8), Piece(8, 16, 4), Piece(12, 24, 4)]
    assert split.pieces(1, 2) == [Piece(0, 8, 8), Piece(8, 20, 4), Piece(12, 28, 4)]
    assert split.pieces(0, 1) == [Piece(0, 0, 16), Piece(16, 16, 8), Piece(24, 24, 8)]


def test_shared_heads_have_copies_on_neighbours() -> None:
    split = Split(0, (Q, KV))
    assert [split.pieces(rank, 4)[1] for rank in range(4)] == [
        Piece(4, 16, 4, 2),
        Piece(4, 16, 4, 2),
        Piece(4, 20, 4, 2),
        Piece(4, 20, 4, 2),
    ]


def test_takes_what_the_pieces_say() -> None:
    whole = torch.arange(24.0).view(2, 12)
    split = Split(1, (Section.even(8, "hidden"), Section.even(4, "hidden")))
    part = split.take(whole, 1, 4)
    torch.testing.assert_close(part, torch.tensor([[2.0, 3.0, 9.0], [14.0, 15.0, 21.0]]))
    part.zero_()
    assert whole[0, 2] == 2  # a copy


def test_obstacles_name_the_setting_and_what_would_do() -> None:
    split = Split(0, (Q, KV))
    assert (split.obstacle(4), split.obstacle(8), split.obstacle(3)) == (None, "heads=4", "heads=4")
    with pytest.raises(ValueError, match=r"heads=4 cannot be cut into 8 parts; possible here: 1, 2, 4"):
        split.pieces(0, 8)
    with pytest.raises(ValueError, match=r"kv_heads=2 cannot be cut into 4 parts; possible here: 1, 2$"):
        Split(0, (Q, replace(KV, shared=False))).pieces(0, 4)


def test_every_part_adds_its_share_of_a_bias() -> None:
    linear = torch.nn.Linear(3, 2)
    x = torch.randn(5, 3)
    shared = SharedBias(linear, 4)
    torch.testing.assert_close(sum(shared(x) for _ in range(4)), 4 * (x @ linear.weight.T) + linear.bias)
    assert dict(shared.named_parameters()).keys() == {"weight", "bias"}


# Parts of these need sums over all parts, which only ranks have: test_tensor.py.
ACROSS = {"wide_attention", "hgrn2", "mamba", "mamba2"}
KINDS = {**MIXERS, **FFNS}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ACROSS | {"moe", "moe_softmax", "zaya_moe"}])
def test_parts_add_up_to_the_whole(kind: str, ranks: int) -> None:
    """On one process: every mixer and every dense FFN, or what is inside it."""
    torch.manual_seed(0)
    for unit in layer_units(kind):
        parameters(unit)
        x = torch.randn(2, 24, width(unit), dtype=torch.float64)
        parts = [unit.part(rank, ranks) for rank in range(ranks)]
        assert all(type(part) is type(unit) for part in parts)
        y = call(unit, x)
        difference = (sum(call(part, x) for part in parts) - y).abs().max()
        assert difference <= 1e-13 * y.abs().max() and y.abs().max() > 0.01
        # Nothing is held twice but shared heads, and nothing is left out.
        for name, split in unit.splits().items():
            covered, held = torch.zeros(2, split.whole(), dtype=torch.int64)
            for rank in range(ranks):
                for piece in split.pieces(rank, ranks):
                    covered[piece.start : piece.start + piece.length] += 1
                    held[piece.start : piece.start + piece.length] = piece.copies
            assert torch.equal(covered, held) and covered.min() >= 1, name


def layer_units(kind: str) -> list[Any]:
    config = {**KINDS[kind], **WIDER.get(kind, {})}
    union: Any = AnyMixer if kind in MIXERS else AnyFFN
    sublayer = TypeAdapter(union).validate_python(config).build(32)
    sublayer.place(1, 2)
    return [sublayer] if sublayer.splits() else [unit for _, unit in units(sublayer)]


@torch.no_grad()
def parameters(unit: nn.Module) -> None:
    """Numbers that make every parameter show."""
    for parameter in unit.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0.0, 0.3)
        else:
            parameter += 0.1 * torch.randn_like(parameter)
        parameter.data = parameter.data.double()


def width(unit: Any) -> int:
    return int(unit.gate_up.in_features) if isinstance(unit, GLU) else 32


def call(unit: Any, x: Tensor) -> Tensor:
    sequence = SequenceContext.of(torch.zeros(x.shape[:2], dtype=torch.int64), None)
    if isinstance(unit, Mixer):
        return unit(x, sequence)
    if isinstance(unit, ContextualFFN):
        return unit(x, sequence, None, Carry())[0]
    y: Tensor = unit(x)
    return y


def test_a_part_keeps_what_its_place_in_the_model_decides() -> None:
    (unit,) = layer_units("hgrn2")
    assert unit.lower_bound == 0.5
    assert unit.part(1, 4).lower_bound == 0.5


def test_only_the_first_part_counts_the_load() -> None:
    (unit,) = layer_units("union_of_experts")
    parts = [unit.part(rank, 2) for rank in range(2)]
    for part in parts:
        part(torch.randn(1, 8, 32), SequenceContext.of(torch.zeros(1, 8, dtype=torch.int64), None), None, Carry())
    loads = [part.routing.data_router.load for part in parts]
    assert loads[0].sum() == 16 and loads[1].sum() == 0


def on_meta(family: str, **changes: Any) -> Decoder:
    with torch.device("meta"):
        return build(family, **changes)


def test_what_fits_is_not_refused() -> None:
    for family in FAMILIES:
        if "wide_attention" not in family:
            check_tensor(on_meta(family), 1)
            check_tensor(on_meta(family), 2, length=64, cp=2)


def test_refusals_name_the_field_and_the_sizes() -> None:
    with pytest.raises(
        ValueError,
        match=r"heads=3 of blocks\.0\.mixer \(Attention\) cannot be cut over mesh\.tp=2; this model allows mesh\.tp 1$",
    ):
        check_tensor(on_meta("mixer wide_attention"), 2)
    with pytest.raises(ValueError, match=r"value_heads=2 of blocks\.0\.mixer .* allows mesh\.tp 1, 2$"):
        check_tensor(on_meta("mixer gated_delta_net"), 4)
    with pytest.raises(ValueError, match=r"vocabulary=250 of model \(Decoder\).* allows mesh\.tp 1, 2$"):
        check_tensor(on_meta("mixer attention", vocabulary=250), 4)
    with pytest.raises(ValueError, match=r"kv_heads=2 of blocks\.0\.mixer \(CCA\)"):
        check_tensor(on_meta("mixer cca"), 4)
    with pytest.raises(ValueError, match=r"hidden=30 of blocks\.0\.ffn"):
        ffn = {"swiglu": {"kind": "swiglu", "hidden": 30}}
        check_tensor(on_meta("mixer attention", ffns=ffn), 4)
    with pytest.raises(
        ValueError, match=r"data\.sequence_length=36 .* mesh\.tp=4 and mesh\.cp=2; choose a multiple of 16"
    ):
        check_tensor(on_meta("mixer smha"), 4, length=36, cp=2)


def test_a_mixer_that_states_nothing_is_refused() -> None:
    model = on_meta("mixer attention")
    model.blocks[1].mixer.splits = dict
    with pytest.raises(
        ValueError, match=r"blocks\.1\.mixer \(Attention\) cannot be cut over mesh\.tp=2; use another mixer"
    ):
        check_tensor(model, 2)
