"""Decoding with caches equals the full forward pass; sampling follows its options."""

from __future__ import annotations

import pytest
import torch

from pretrain.generate import generate, restrict
from tests.pretrain.small import decoder, tokens


@pytest.mark.parametrize("layers", [["gdn + swiglu"], ["attention + moe"], ["window + hourglass"], None])
@pytest.mark.parametrize("prompt", [1, 3, 4, 17])
def test_decode_equals_full_forward(layers: list[str] | None, prompt: int) -> None:
    model = decoder(**({"layers": layers, "repeat": 2} if layers else {})).double().eval()
    row = tokens(2, 30)
    full = model(row)
    cache = model.new_cache()
    with torch.no_grad():
        parts = [model(row[:, :prompt], cache=cache)]
        parts += [model(row[:, t : t + 1], cache=cache) for t in range(prompt, 30)]
    assert cache.length == 30
    assert (torch.cat(parts, dim=1) - full).abs().max() < 1e-5


def test_decode_in_uneven_pieces_equals_full_forward() -> None:
    model = decoder().double().eval()
    row = tokens(1, 40)
    cache = model.new_cache()
    with torch.no_grad():
        parts = [model(piece, cache=cache) for piece in row.split([5, 1, 20, 2, 12], dim=1)]
    assert (torch.cat(parts, dim=1) - model(row)).abs().max() < 1e-5


def test_recurrent_cache_does_not_grow_and_window_cache_is_bounded() -> None:
    model = decoder(layers=["gdn + swiglu", "window + swiglu"]).eval()
    cache, sizes = model.new_cache(), []
    with torch.no_grad():
        for position in range(20):
            model(tokens(1, 1, seed=position), cache=cache)
            sizes.append(cache.bytes())
    assert sizes[4:] == [sizes[4]] * 16
    assert cache.layers[1].mixer["k"].shape[1] == 4  # a window of 5 keys: the 4 before the next token


def test_greedy_generation_is_the_argmax_of_the_full_forward() -> None:
    model = decoder().eval()
    prompt = tokens(6).tolist()
    (written,) = generate(model, prompt, tokens=8, temperature=0.0)
    row = list(prompt)
    for token in written:
        assert model(torch.tensor([row]))[0, -1].argmax().item() == token
        row.append(token)


def test_seed_decides_the_sample_and_end_token_stops_it() -> None:
    model = decoder(init_std=0.02).eval()
    first, again, other = (generate(model, [1, 2], tokens=12, temperature=1.0, seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    end = first[0][5]
    (stopped,) = generate(model, [1, 2], tokens=12, temperature=1.0, seed=3, end=end)
    assert stopped == first[0][: first[0].index(end)]


def test_samples_differ_and_come_in_order() -> None:
    texts = generate(decoder(init_std=0.02).eval(), [1], tokens=8, temperature=1.0, samples=3)
    assert len(texts) == 3 and len({tuple(text) for text in texts}) == 3


def test_restrict_keeps_the_likeliest_tokens() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.15, 0.25, 0.5]]).log()
    kept = lambda result: result.isfinite().tolist()  # noqa: E731
    assert kept(restrict(logits, 2, None)) == [[True, True, False, False], [False, False, True, True]]
    assert kept(restrict(logits, None, 0.5)) == [[True, False, False, False], [False, False, False, True]]
    assert kept(restrict(logits, None, 0.6)) == [[True, True, False, False], [False, False, True, True]]
    assert kept(restrict(logits, 3, 0.8)) == [[True, True, False, False], [False, False, True, True]]
    assert kept(restrict(logits, None, 1e-9)) == [[True, False, False, False], [False, False, False, True]]
