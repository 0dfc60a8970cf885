"""Generation in fixed buffers writes what generation with growing caches writes."""

from __future__ import annotations

import pytest
import torch

from pretrain.generate import generate
from pretrain.model.decoder import Decoder
from pretrain.model.fixed import FixedDecoding, objection
from tests.pretrain.families import FAMILIES, build
from tests.pretrain.small import decoder, tokens

CAN = [name for name in FAMILIES if objection(build(name)) is None]


def both(model: Decoder, prompt: int, steps: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor, FixedDecoding]:
    """Logits [rows, steps, vocabulary] after a prompt: by growing caches, and in fixed buffers."""
    model = model.double().eval()
    row = tokens(rows, prompt + steps)
    grown, caches = [], [model.new_cache(), model.new_cache()]
    with torch.inference_mode():
        for cache in caches:
            model(row[:, :prompt], cache=cache)
        decoding = FixedDecoding(model, caches[1], rows, steps)
        fixed = []
        for at in range(prompt, prompt + steps):
            grown.append(model(row[:, at : at + 1], cache=caches[0])[:, -1])
            fixed.append(decoding(row[:, at : at + 1]).clone())
    return torch.stack(grown, 1), torch.stack(fixed, 1), decoding


def test_nearly_all_families_can() -> None:
    assert {name for name in FAMILIES if name not in CAN} == {
        "mixer smha", "mixer smha_threshold", "ffn union_of_experts", "ffn union_threshold",
        "Union of Experts",
    }  # fmt: skip


@pytest.mark.parametrize("family", CAN)
def test_logits_are_those_of_growing_caches(family: str) -> None:
    grown, fixed, _ = both(build(family), prompt=5, steps=6)
    assert (grown - fixed).abs().max() < 1e-5  # the readout is in fp32


@pytest.mark.parametrize("prompt", [1, 4, 5, 6, 13])
def test_a_window_goes_round(prompt: int) -> None:
    """A window of 5 keys, prompts shorter and longer than it, and tokens enough to overwrite all of it twice."""
    grown, fixed, decoding = both(decoder(layers=["window + swiglu", "gdn + moe"]), prompt, steps=12)
    assert (grown - fixed).abs().max() < 1e-5
    assert decoding.held[id(decoding.cache.layers[0].mixer), "k"].shape[1] == 5


def test_memory_stays_where_it_is() -> None:
    """What a CUDA graph needs: after the first step, no buffer moves and none is replaced."""
    model = decoder().eval()
    cache = model.new_cache()
    with torch.inference_mode():
        model(tokens(1, 4), cache=cache)
        decoding = FixedDecoding(model, cache, 1, 8)
        places = []
        for _ in range(8):
            decoding(tokens(1, 1))
            held = [t for layer in cache.layers for part in (layer.mixer, layer.ffn) for t in part.values()]
            places.append([t.data_ptr() for t in (*held, decoding.tokens, decoding.position, decoding.logits)])  # type: ignore[union-attr]
    assert places[1:] == [places[1]] * 7
    assert decoding.position.item() == 12 == cache.length
    with pytest.raises(AssertionError, match="room"):
        decoding(tokens(1, 1))


def test_generation_writes_the_same_tokens() -> None:
    model = decoder(init_std=0.05)
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3, "samples": 2}):
        prompt = tokens(6).tolist()
        plain = generate(model, prompt, tokens=20, fixed=False, **options)  # type: ignore[arg-type]
        assert generate(model, prompt, tokens=20, fixed=True, **options) == plain  # type: ignore[arg-type]


def test_who_cannot_is_told_why() -> None:
    with pytest.raises(ValueError, match="no generation in fixed buffers: SelectiveAttention remembers more"):
        generate(build("mixer smha"), [1, 2], tokens=3, fixed=True)


@pytest.mark.gpu
def test_a_captured_step_replays() -> None:
    model = decoder(init_std=0.05).cuda()
    prompt = tokens(6).tolist()
    plain = generate(model, prompt, tokens=30, temperature=0.0, fixed=False)
    assert generate(model, prompt, tokens=30, temperature=0.0, fixed=True) == plain
