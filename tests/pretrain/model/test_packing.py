"""Packed documents never see each other, and a packed row computes what its documents would compute alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests.pretrain.small import decoder, tokens

LAYERS = ["gdn + swiglu", "attention + swiglu", "window + swiglu", "gdn + moe", "attention + hourglass"]
BORDERS = [0, 1, 8, 9, 40, 72, 75]  # sequences of length 1, shorter than a convolution, longer than nothing special


@pytest.mark.parametrize("layer", LAYERS)
def test_no_output_depends_on_another_document(layer: str) -> None:
    model = decoder(layers=[layer], repeat=2).double()
    row, cu_seqlens = tokens(1, BORDERS[-1]), torch.tensor(BORDERS, dtype=torch.int32)
    before = model(row, cu_seqlens=cu_seqlens)
    for begin, end in pairwise(BORDERS):
        changed = row.clone()
        changed[0, begin:end] = (changed[0, begin:end] + 1) % 64
        difference = (model(changed, cu_seqlens=cu_seqlens) - before).abs().amax(dim=-1)[0]
        inside = torch.zeros(BORDERS[-1], dtype=torch.bool)
        inside[begin:end] = True
        assert difference[~inside].max() == 0, f"document {begin}:{end} leaks"
        assert difference[inside].min() > 1e-4


@pytest.mark.parametrize("layer", LAYERS)
def test_no_gradient_crosses_a_border(layer: str) -> None:
    model = decoder(layers=[layer], repeat=2).double()
    row, cu_seqlens = tokens(1, BORDERS[-1]), torch.tensor(BORDERS, dtype=torch.int32)
    embedded: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    model.embedding.register_forward_hook(keep)
    model(row, cu_seqlens=cu_seqlens)[0, 9:40].square().sum().backward()
    gradient = embedded[0].grad[0].abs().amax(dim=-1)
    assert gradient[:9].max() == 0 and gradient[40:].max() == 0
    assert gradient[9:40].min() > 0


def test_packed_equals_each_document_alone() -> None:
    model = decoder().double()
    row, cu_seqlens = tokens(1, BORDERS[-1]), torch.tensor(BORDERS, dtype=torch.int32)
    packed = model(row, cu_seqlens=cu_seqlens)
    alone = torch.cat([model(row[:, begin:end]) for begin, end in pairwise(BORDERS)], dim=1)
    assert (packed - alone).abs().max() < 1e-5  # logits are fp32


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model = decoder().double()
    row = tokens(2, 40)
    before = model(row)
    changed = row.clone()
    changed[:, 25:] = (changed[:, 25:] + 1) % 64
    difference = (model(changed) - before).abs().amax(dim=-1)
    assert difference[:, :25].max() == 0
    assert difference[:, 25:].min() > 1e-4


def test_packed_row_must_be_one_row() -> None:
    with pytest.raises(ValueError, match=r"flatten them to \[1, B\*T\]"):
        decoder()(tokens(2, 8), cu_seqlens=torch.tensor([0, 8], dtype=torch.int32))
