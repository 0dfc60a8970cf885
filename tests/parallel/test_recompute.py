"""Recomputed blocks give the numbers of plain ones, and hold less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel.recompute import Mode, apply_recompute
from pretrain.model.decoder import Decoder
from tests.pretrain.families import FAMILIES, build


def run(model: Decoder) -> tuple[Tensor, dict[str, Tensor | None]]:
    rows = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(0))
    loss = model.train()(rows[:, :-1], targets=rows[:, 1:])
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


EVERY = [(family, mode) for family in FAMILIES for mode in ("full", "selective")]
PARTS = [
    (family, mode) for family in ("ZAYA1", "Qwen3-Next", "Mamba-2, one sublayer a layer") for mode in ("mixer", "ffn")
]


@pytest.mark.parametrize(("family", "mode"), EVERY + PARTS)
def test_recomputation_changes_no_bit(family: str, mode: Mode) -> None:
    plain, again = build(family), build(family)
    apply_recompute(again.blocks, mode)
    (loss, gradients), (loss_again, gradients_again) = run(plain), run(again)
    assert torch.equal(loss, loss_again)
    assert list(gradients) == list(gradients_again)
    for name, gradient in gradients.items():
        other = gradients_again[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or other is None or torch.equal(gradient, other), name


def held(mode: Mode) -> int:
    """Bytes that the forward pass leaves for the backward pass, the parameters not counted."""
    model = build("mixer gated_delta_net", width=64, layers=["gated_delta_net + swiglu x6"]).train()
    apply_recompute(model.blocks, mode)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    rows = torch.randint(0, 256, (2, 129))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(rows[:, :-1], targets=rows[:, 1:])
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in saved.items() if pointer not in own)


def test_recomputation_holds_less() -> None:
    stream = 2 * 128 * 64 * 4  # bytes of the residual stream: what "full" keeps for each of the six blocks
    none, full = held("none"), held("full")
    assert full < held("ffn") < none and full < held("mixer") < none
    assert full < 0.3 * none
    assert full < 10 * stream
