"""Norm placements, residual scaling, parallel sublayers and multi-token prediction, each against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import rms_norm
from pretrain.model.block import Block, ResidualScaling
from pretrain.model.decoder import Decoder, DecoderConfig
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import Carry
from tests.pretrain.families import FFNS, MIXERS
from tests.pretrain.small import decoder, tokens

PLAIN = {"layers": ["attention + swiglu x2"]}


def norm(weight: Tensor, x: Tensor) -> Tensor:
    return rms_norm(x, weight, 1e-6)


def scramble(model: nn.Module, seed: int = 1) -> None:
    """Norm weights away from 1, so that a missing or doubled norm shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand(parameter.shape, generator=generator) * 0.5)


@pytest.mark.parametrize("placement", ["pre", "post", "peri"])
def test_norms_stand_where_the_placement_says(placement: str) -> None:
    model = decoder(**PLAIN, block={"norm": placement})
    scramble(model)
    block = model.blocks[0]
    assert isinstance(block, Block)
    x = torch.randn(2, 7, 32)
    sequence = SequenceContext.of(tokens(2, 7), None)

    def sublayer(before: Any, f: Any, after: Any, h: Tensor) -> Tensor:
        inside = h if placement == "post" else norm(before.weight, h)
        y = f(inside)
        return h + (y if placement == "pre" else norm(after.weight, y))

    h = sublayer(block.mixer_norm, lambda z: block.mixer(z, sequence), block.mixer_out_norm, x)
    expected = sublayer(block.ffn_norm, block.ffn, block.ffn_out_norm, h)
    torch.testing.assert_close(block(x, sequence)[0], expected)


def test_another_placement_for_the_layers_of_one_mixer() -> None:
    model = decoder(
        layers=["gdn + swiglu", "attention + swiglu"], block={"norm": "pre", "norm_of": {"attention": "post"}}
    )
    linear, attention = model.blocks
    assert linear.mixer_norm is not None and linear.mixer_out_norm is None
    assert attention.mixer_norm is None and attention.mixer_out_norm is not None
    with pytest.raises(ValueError, match=r"block.norm_of names 'atention', but mixers defines only"):
        decoder(block={"norm_of": {"atention": "post"}})


def test_parallel_sublayers_read_the_same_normalised_input() -> None:
    model = decoder(**PLAIN, block={"parallel": True})
    scramble(model)
    block = model.blocks[0]
    x, sequence = torch.randn(1, 5, 32), SequenceContext.of(tokens(1, 5), None)
    h = norm(block.mixer_norm.weight, x)
    torch.testing.assert_close(block(x, sequence)[0], x + block.mixer(h, sequence) + block.ffn(h))
    assert block.ffn_norm is None


def test_residual_scaling_starts_as_a_plain_sum_and_scales_by_channel() -> None:
    plain, scaled = decoder(**PLAIN), decoder(**PLAIN, block={"residual_scaling": True})
    row = tokens(2, 9)
    torch.testing.assert_close(scaled(row), plain(row), rtol=0, atol=0)
    extra = sum(p.numel() for p in scaled.parameters()) - sum(p.numel() for p in plain.parameters())
    assert extra == 2 * 8 * 32 + 2 * 32  # four vectors a sublayer, two sublayers a layer, two for the embedding
    merge = ResidualScaling(3)
    with torch.no_grad():
        merge.stream_scale.copy_(torch.tensor([1.0, 2.0, 3.0]))
        merge.stream_bias.fill_(0.5)
        merge.output_scale.fill_(-1.0)
        merge.output_bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    x, y = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([10.0, 20.0, 30.0])
    assert merge(x, y).tolist() == [1.5 - 10.0, 3.0 - 21.0, 4.5 - 32.0]


def test_zero_centred_norms_are_the_same_function_at_the_start() -> None:
    plain, centred = decoder(**PLAIN), decoder(**PLAIN, block={"zero_centered_norms": True})
    assert centred.norm.weight.abs().sum() == 0
    torch.testing.assert_close(centred(tokens(1, 9)), plain(tokens(1, 9)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"parallel": True}, "block.parallel: Hourglass adds its own residual"),
        ({"residual_scaling": True}, "block.residual_scaling: Hourglass adds its own residual"),
        ({"norm": "post"}, "block.norm = post: Hourglass brings norms before its parts"),
    ],
)
def test_a_stack_with_its_own_residual_refuses_what_it_cannot_have(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder(layers=["attention + hourglass"], block=block)


@pytest.mark.parametrize("block", [{"norm": "peri"}, {"parallel": True}, {"residual_scaling": True, "norm": "post"}])
def test_packing_and_decoding_hold_in_every_block(block: dict[str, Any]) -> None:
    model = decoder(layers=["gdn + swiglu", "attention + moe", "window + swiglu"], block=block).eval()
    scramble(model)
    row = tokens(1, 12)
    whole = model(row)
    packed = model(torch.cat((row, row[:, :5]), dim=1), cu_seqlens=torch.tensor([0, 12, 17], dtype=torch.int32))
    torch.testing.assert_close(packed[:, :12], whole, rtol=1e-5, atol=1e-5)
    cache = model.new_cache()
    steps = [model(row[:, :4], cache=cache)] + [model(row[:, t : t + 1], cache=cache) for t in range(4, 12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ffn", FFNS)
def test_a_block_returns_no_view_and_nothing_that_it_was_given(ffn: str) -> None:
    """Engines hang hooks on what it returns. Linears return views, and so does whatever hands its input on."""
    layers = {"mixers": {"gla": MIXERS["gla"]}, "ffns": {"ffn": FFNS[ffn]}, "layers": ["gla + ffn x2"]}
    model = Decoder(DecoderConfig.model_validate({"vocabulary": 8, "width": 32, **layers}))
    x = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    carry = Carry(None, torch.zeros(1, requires_grad=True)[0])
    for block in model.blocks:
        y, passed = block(x, SequenceContext.of(torch.zeros(1, 12, dtype=torch.int64), None), None, carry)
        for tensor in (y, *passed):
            assert tensor is None or (tensor._base is None and all(tensor is not given for given in (x, *carry)))
        x, carry = y, passed
    (x.sum() + sum(tensor.sum() for tensor in carry if tensor is not None)).backward()


def test_following_stays_within_each_sequence() -> None:
    row = torch.arange(10, 18)[None]
    assert SequenceContext.of(row, None).following(row, -1).tolist() == [[11, 12, 13, 14, 15, 16, 17, -1]]
    borders = torch.tensor([0, 3, 4, 8], dtype=torch.int32)
    assert SequenceContext.of(row, borders).following(row, -1).tolist() == [[11, 12, -1, -1, 15, 16, 17, -1]]
    borders = torch.tensor([0, 0, 3, 4, 4, 8, 8], dtype=torch.int32)  # the empty ones change nothing
    assert SequenceContext.of(row, borders).following(row, -1).tolist() == [[11, 12, -1, -1, 15, 16, 17, -1]]


def multi(**changes: Any) -> Decoder:
    return decoder(**PLAIN, multi_token={"layer": "attention + swiglu", "weight": 0.5}, **changes)


def test_multi_token_prediction_adds_its_gradient_and_leaves_the_loss_and_the_logits() -> None:
    plain, more = decoder(**PLAIN), multi()
    more.load_state_dict(plain.state_dict(), strict=False)
    row = tokens(2, 10)
    targets = torch.cat((row[:, 1:], torch.full((2, 1), -100)), dim=1)
    assert torch.equal(plain(row), more(row))
    loss, loss_more = plain(row, targets), more(row, targets)
    assert torch.equal(loss, loss_more)
    loss.backward()
    loss_more.backward()
    # By hand: the extra layer reads the stream and the next token's embedding, and predicts the token after next.
    again = multi()
    again.load_state_dict(more.state_dict())
    sequence = SequenceContext.of(row, None)
    x = again.embed(row)
    for block in again.blocks:
        x, _ = block(x, sequence)
    part = again.multi_token
    assert part is not None
    joined = part.join(torch.cat((part.stream_norm(x[:, :8]), part.token_norm(again.embedding(row[:, 1:9]))), dim=-1))
    y, _ = part.block(joined, SequenceContext.of(row[:, :8], None))
    total = again.loss(x, targets) + 0.5 * again.loss(y, row[:, 2:])
    total.backward()
    for (name, one), (_, two) in zip(more.named_parameters(), again.named_parameters()):
        assert one.grad is not None and two.grad is not None, name
        torch.testing.assert_close(
            one.grad, two.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    difference = (more.embedding.weight.grad - plain.embedding.weight.grad).abs().max()
    assert difference > 1e-3


def test_multi_token_prediction_respects_packing() -> None:
    model = multi()
    row = tokens(1, 9)
    borders = torch.tensor([0, 4, 9], dtype=torch.int32)
    targets = SequenceContext.of(row, borders).following(row, -100)

    def gradients(*calls: tuple[Tensor, Tensor, Tensor | None]) -> dict[str, Tensor]:
        model.zero_grad()
        for inputs, wanted, cu_seqlens in calls:
            model(inputs, wanted, cu_seqlens=cu_seqlens).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    packed = gradients((row, targets, borders))
    alone = gradients((row[:, :4], targets[:, :4], None), (row[:, 4:], targets[:, 4:], None))
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-4, atol=1e-5)


def test_multi_token_layer_must_be_one_known_layer() -> None:
    with pytest.raises(ValueError, match=r"multi_token.layer = 'attention \+ swiglu x2': exactly one layer"):
        decoder(multi_token={"layer": "attention + swiglu x2"})
    with pytest.raises(ValueError, match=r"names 'swigl'.*did you mean 'swiglu'"):
        decoder(multi_token={"layer": "attention + swigl"})
