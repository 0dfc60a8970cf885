"""The softmax mixers (attention, cca, mla) by themselves: causality, packing, caches, gradients, counts, refusals."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pretrain.model.mixers.attention import AttentionConfig
from pretrain.model.mixers.cca import CCA, CCAConfig
from pretrain.model.mixers.mla import MLA, MLAConfig
from pretrain.model.rotary import apply_rotary
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import Mixer, MixerConfig

WIDTH = 24
CONFIGS: dict[str, MixerConfig] = {
    "multi-head": AttentionConfig(heads=3),
    "grouped": AttentionConfig(heads=6, kv_heads=2, rope_fraction=0.5),
    "multi-query": AttentionConfig(heads=4, kv_heads=1, qk_norm=False),
    "no positions": AttentionConfig(heads=2, rope_fraction=0.0),
    "window": AttentionConfig(heads=4, kv_heads=2, window=4),
    "window of 1": AttentionConfig(heads=2, window=1, qk_norm=False, rope_fraction=0.0),
    "norm over the width": AttentionConfig(heads=4, kv_heads=2, qk_norm_over="width"),
    "zero-centered, gated": AttentionConfig(
        heads=4, kv_heads=2, head_dim=10, rope_fraction=0.4, zero_centered_norm=True, output_gate=True
    ),
    "wide, biased, scaled": AttentionConfig(
        heads=5, head_dim=8, qk_norm=False, qkv_bias=True, out_bias=True, output_gate=True, scale=0.2
    ),
    "cca": CCAConfig(heads=4, kv_heads=2, head_dim=6, rope_fraction=0.34),
    "cca, one key head": CCAConfig(heads=3, kv_heads=1, head_dim=4, temperature="exp"),
    "cca, long taps": CCAConfig(heads=2, head_dim=4, depthwise_taps=4, grouped_taps=3, window=5),
    "cca, one tap": CCAConfig(heads=2, head_dim=4, depthwise_taps=1, grouped_taps=1, rope_fraction=0.0),
    "mla": MLAConfig(heads=3, kv_rank=8, head_dim=6, shared_dim=4, value_dim=5),
    "mla, rotated": MLAConfig(heads=3, kv_rank=8, query_rank=10, head_dim=6, shared_dim=4, rope=True),
    "mla, nothing shared": MLAConfig(heads=2, kv_rank=5, head_dim=6, shared_dim=0, scale=0.3),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)
CCAS = pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("cca")])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(name: str) -> Mixer:
    """The mixer in fp64, no parameter at a special value."""
    torch.manual_seed(0)
    mixer = CONFIGS[name].build(WIDTH).double()
    with torch.no_grad():
        for seed, parameter in enumerate(mixer.parameters()):
            parameter.add_(draw(*parameter.shape, seed=seed) * 0.4)
    return mixer


def call(
    mixer: Mixer,
    x: torch.Tensor,
    offset: int = 0,
    borders: list[int] | None = None,
    cache: dict[str, Any] | None = None,
) -> torch.Tensor:
    return mixer(x, context(x, offset, borders), cache)


def context(x: torch.Tensor, offset: int = 0, borders: list[int] | None = None) -> SequenceContext:
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    return SequenceContext.of(torch.zeros(x.shape[:2], dtype=torch.int64), cu_seqlens, offset)


@EVERY
def test_later_tokens_change_nothing_before_them(name: str) -> None:
    mixer, x = build(name), draw(2, 12, WIDTH)
    before = call(mixer, x)
    for t in (0, 1, 7, 11):
        changed = x.clone()
        changed[:, t] += 1.0
        difference = (call(mixer, changed) - before).abs().amax(dim=(0, 2))
        assert difference[:t].sum() == 0
        assert difference[t] > 1e-6


@EVERY
def test_packed_documents_are_each_alone(name: str) -> None:
    """Outputs and every gradient; documents of one and two tokens, and an empty one."""
    mixer, borders = build(name), [0, 1, 3, 3, 4, 13, 21]
    x, upstream = draw(1, borders[-1], WIDTH), draw(1, borders[-1], WIDTH, seed=1)
    results = []
    for packed in (True, False):
        leaf = x.clone().requires_grad_()
        if packed:
            y = call(mixer, leaf, borders=borders)
        else:
            y = torch.cat([call(mixer, leaf[:, a:b]) for a, b in pairwise(borders) if b > a], dim=1)
        gradients = torch.autograd.grad(y, [leaf, *mixer.parameters()], upstream)
        results.append([y, *gradients])
    for ours, alone in zip(*results, strict=True):
        torch.testing.assert_close(ours, alone, atol=1e-10, rtol=1e-10)


@EVERY
@pytest.mark.parametrize("prompt", [1, 2, 3, 7])
def test_prompt_then_single_tokens_is_the_whole(name: str, prompt: int) -> None:
    mixer, x = build(name), draw(2, 14, WIDTH)
    cache: dict[str, Any] = {}
    with torch.no_grad():
        parts = [call(mixer, x[:, :prompt], cache=cache)]
        parts += [call(mixer, x[:, t : t + 1], offset=t, cache=cache) for t in range(prompt, 14)]
        whole = call(mixer, x)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-10, rtol=1e-10)


@EVERY
@pytest.mark.parametrize("cuts", [(0, 1, 6, 7, 14), (0, 5, 11, 12, 13, 14), (0, 2, 14)], ids=str)
def test_prompt_then_chunks_is_the_whole(name: str, cuts: tuple[int, ...]) -> None:
    mixer, x = build(name), draw(2, 14, WIDTH)
    cache: dict[str, Any] = {}
    with torch.no_grad():
        parts = [call(mixer, x[:, a:b], offset=a, cache=cache) for a, b in pairwise(cuts)]
        whole = call(mixer, x)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-10, rtol=1e-10)


# The softmax over a single key does not depend on the scores: with a window of 1, queries and keys have no gradient.
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "window of 1"])
def test_every_parameter_and_token_gets_a_gradient(name: str) -> None:
    mixer, x = build(name), draw(1, 9, WIDTH).requires_grad_()
    (call(mixer, x) * draw(1, 9, WIDTH, seed=1)).sum().backward()
    silent = [key for key, parameter in mixer.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert silent == []
    assert x.grad is not None and x.grad.abs().amax(dim=-1).min() > 0
    if "qkv.weight" in dict(mixer.named_parameters()):
        assert mixer.qkv.weight.grad.abs().amax(dim=-1).min() > 0


@EVERY
def test_bf16_autocast_stays_near(name: str) -> None:
    mixer, x = build(name), draw(2, 16, WIDTH)
    exact = call(mixer, x).detach()
    mixer.float()
    cache: dict[str, Any] = {}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(mixer, x.float())
        with torch.no_grad():
            parts = [call(mixer, x[:, :9].float(), cache=cache)]
            parts += [call(mixer, x[:, t : t + 1].float(), offset=t, cache=cache) for t in range(9, 16)]
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    for result in (y, torch.cat(parts, dim=1)):
        assert (result.double() - exact).norm() < 0.03 * exact.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    assert all(value.dtype == torch.bfloat16 for value in cache.values())


@pytest.mark.parametrize("name", [name for name in CONFIGS if "window" not in name and "long taps" not in name])
def test_flops_are_what_torch_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The definitions compute all T x T scores as matrix products; a depthwise convolution is none, and is not counted."""
    monkeypatch.setenv("BRAID_KERNELS", "reference")
    mixer, T = build(name), 10
    with FlopCounterMode(display=False) as counter:
        call(mixer, draw(1, T, WIDTH))
    depthwise = 2.0 * mixer.depthwise.numel() if isinstance(mixer, CCA) else 0.0
    assert counter.get_total_flops() / T == mixer.flops_per_token(T) - depthwise


@pytest.mark.parametrize("name", ["window", "cca, long taps"])
def test_window_bounds_reach_cost_and_cache(name: str) -> None:
    mixer, x = build(name), draw(1, 20, WIDTH)
    window = mixer.window
    assert isinstance(window, int)
    assert mixer.flops_per_token(1000.0) == mixer.flops_per_token(window) > mixer.flops_per_token(window - 1)
    reach = window - 1 + (sum(mixer.taps) - 2 if isinstance(mixer, CCA) else 0)  # of the keys, and of what they see
    changed = x.clone()
    changed[:, 8] += 1.0
    difference = (call(mixer, changed) - call(mixer, x)).abs().amax(dim=-1)[0]
    assert difference[8 : 8 + reach + 1].min() > 0 and difference[8 + reach + 1 :].sum() == 0
    cache: dict[str, Any] = {}
    with torch.no_grad():
        for t in range(20):
            call(mixer, x[:, t : t + 1], offset=t, cache=cache)
    assert cache["k"].shape[1] == cache["v"].shape[1] == window - 1


@EVERY
def test_output_projection_and_config_round_trip(name: str) -> None:
    mixer, config = build(name), CONFIGS[name]
    (weight,) = mixer.output_projections()
    assert weight is mixer.out.weight and weight.shape[0] == WIDTH
    again = TypeAdapter(type(config)).validate_python(config.model_dump())
    assert {k: v.shape for k, v in again.build(WIDTH).state_dict().items()} == {
        k: v.shape for k, v in mixer.state_dict().items()
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AttentionConfig(heads=5), "heads=5 does not divide width=24"),
        (AttentionConfig(heads=6, kv_heads=4), "kv_heads=4 does not divide heads=6; choose one of 1, 2, 3, 6"),
        (AttentionConfig(heads=4, rope_fraction=0.2), "rope_fraction=0.2 of head_dim=6 .* at least 0.333, or 0"),
        (AttentionConfig(heads=4, qk_norm=False, zero_centered_norm=True), "zero_centered_norm=True .* set qk_norm"),
        (CCAConfig(heads=4, kv_heads=3), "kv_heads=3 does not divide heads=4"),
        (CCAConfig(heads=2, kv_heads=1, head_dim=5), "head_dim=5 times kv_heads=1 is odd"),
        (CCAConfig(heads=2, head_dim=4, rope_fraction=0.25), "rope_fraction=0.25 of head_dim=4"),
        (MLAConfig(heads=2, kv_rank=4, shared_dim=3, rope=True), "shared_dim=3 .* even number above 0, or rope=False"),
        (MLAConfig(heads=2, kv_rank=4, shared_dim=0, rope=True), "shared_dim=0"),
    ],
)
def test_sizes_that_do_not_fit_name_the_field(config: MixerConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.build(WIDTH)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (AttentionConfig, {"heads": 0}, "heads"),
        (AttentionConfig, {"heads": 2, "qk_norm_over": "heads"}, "qk_norm_over"),
        (AttentionConfig, {"heads": 2, "scale": 0}, "scale"),
        (CCAConfig, {"heads": 2, "temperature": "log"}, "temperature"),
        (CCAConfig, {"heads": 2, "depthwise_taps": 0}, "depthwise_taps"),
        (MLAConfig, {"heads": 2}, "kv_rank"),
        (MLAConfig, {"heads": 2, "kv_rank": 4, "kv_heads": 2}, "did you mean 'heads'"),
    ],
)
def test_fields_out_of_bounds_are_refused(kind: type[MixerConfig], fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        kind.model_validate(fields)


def test_attention_options_against_their_formulas() -> None:
    """Norm over the width, 1 + w, gate, biases and scale, written out with an explicit softmax."""
    config = AttentionConfig(
        heads=4,
        kv_heads=2,
        head_dim=5,
        rope_fraction=0.0,
        qk_norm_over="width",
        zero_centered_norm=True,
        norm_eps=0.3,
        output_gate=True,
        qkv_bias=True,
        out_bias=True,
        scale=0.7,
    )
    mixer, x, T = config.build(WIDTH).double(), draw(1, 6, WIDTH), 6
    with torch.no_grad():
        for seed, parameter in enumerate(mixer.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed) * 0.5)
    p = {key: value.detach() for key, value in mixer.named_parameters()}
    q, k, v = (x @ p["qkv.weight"].T + p["qkv.bias"]).split((20, 10, 10), dim=-1)
    norm = lambda t, w: t / (t.square().mean(-1, keepdim=True) + 0.3).sqrt() * (1 + w)  # noqa: E731
    q, k = norm(q, p["q_norm"]).view(T, 4, 5), norm(k, p["k_norm"]).view(T, 2, 5).repeat_interleave(2, dim=1)
    v = v.view(T, 2, 5).repeat_interleave(2, dim=1)
    scores = 0.7 * torch.einsum("thk,shk->hts", q, k)
    weights = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    o = torch.einsum("hts,shk->thk", weights, v).flatten(1)
    o = o * torch.sigmoid(x[0] @ p["gate.weight"].T + p["gate.bias"])
    torch.testing.assert_close(call(mixer, x)[0], o @ p["out.weight"].T + p["out.bias"], atol=1e-10, rtol=1e-10)


def test_norm_weights_start_as_the_plain_norm() -> None:
    plain, centered = (
        AttentionConfig(heads=4, zero_centered_norm=flag).build(WIDTH).double() for flag in (False, True)
    )
    assert plain.q_norm.eq(1).all() and centered.q_norm.eq(0).all() and centered.k_norm.eq(0).all()
    centered.load_state_dict({**plain.state_dict(), "q_norm": centered.q_norm, "k_norm": centered.k_norm})
    torch.testing.assert_close(call(plain, draw(1, 5, WIDTH)), call(centered, draw(1, 5, WIDTH)), atol=1e-12, rtol=0)


def test_rotation_keeps_double_precision_and_passes_the_rest() -> None:
    x = draw(1, 7, 2, 9)
    cos, sin = context(x).rotary(6, 10_000.0)
    first, second = x[..., :3], x[..., 3:6]
    expected = torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., 6:]), dim=-1)
    torch.testing.assert_close(apply_rotary(x, cos, sin), expected, atol=1e-14, rtol=0)


# Compressed convolutional attention


def test_cca_parameter_count_of_zaya1() -> None:
    mixer = CCAConfig(heads=8, kv_heads=2, head_dim=128).build(2048)
    assert sum(parameter.numel() for parameter in mixer.parameters()) == 5_575_682
    assert mixer.temperature.tolist() == [1.0, 1.0]
    assert CCAConfig(heads=2, temperature="exp").build(8).temperature.tolist() == [0.0, 0.0]


def test_cca_convolutions_start_as_torchs_do() -> None:
    mixer = CCAConfig(heads=3, head_dim=16, depthwise_taps=4, grouped_taps=2).build(8)
    for weight, inputs in ((mixer.depthwise, 4), (mixer.grouped, 2 * 16)):
        assert weight.abs().max() <= inputs**-0.5
        assert weight.std().item() == pytest.approx((3 * inputs) ** -0.5, rel=0.1)  # of a uniform law with that bound
    assert not mixer.depthwise_bias.any() and not mixer.grouped_bias.any()


def conv_kernels(mixer: CCA) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights as torch's conv1d takes them."""
    d = mixer.head_dim
    grouped = mixer.grouped.unflatten(1, (-1, d)).permute(0, 3, 2, 1).flatten(0, 1)
    return mixer.depthwise[:, None], grouped


@CCAS
def test_cca_pads_once_and_twice_would_differ_at_the_start_only(name: str) -> None:
    mixer = build(name)
    assert isinstance(mixer, CCA)
    first, second = mixer.taps
    z = draw(2, 10, sum(mixer.mixed))
    depthwise, grouped = conv_kernels(mixer)
    heads = mixer.heads + mixer.kv_heads
    conv0 = lambda x: F.conv1d(x, depthwise, mixer.depthwise_bias, groups=x.shape[1])  # noqa: E731
    conv1 = lambda x: F.conv1d(x, grouped, mixer.grouped_bias, groups=heads)  # noqa: E731
    zt = z.transpose(1, 2)
    once = conv1(conv0(F.pad(zt, (first + second - 2, 0)))).transpose(1, 2)
    twice = conv1(F.pad(conv0(F.pad(zt, (first - 1, 0))), (second - 1, 0))).transpose(1, 2)
    ours = mixer.queries_and_keys(z, context(z))
    for padded, matters in ((once, 0), (twice, second - 1)):
        s, heads0 = (x.unflatten(-1, (heads, -1)) for x in (padded, z))
        means = query_key_mean(*heads0.split((mixer.heads, mixer.kv_heads), dim=2))
        lengths = (1.0, mixer.temperature.exp() if mixer.exponential else mixer.temperature)
        for x, part, mean, length in zip(ours, s.split((mixer.heads, mixer.kv_heads), dim=2), means, lengths):
            expected = F.normalize(part + mean, dim=-1) * torch.as_tensor(length).view(-1, 1)
            difference = (x - expected).abs().amax(dim=(0, 2, 3))
            assert difference[matters:].max() < 1e-11
            assert (difference[:matters] > 1e-3).all()


@CCAS
def test_cca_lengths_bound_the_logits(name: str) -> None:
    mixer = build(name)
    assert isinstance(mixer, CCA)
    z = draw(2, 10, sum(mixer.mixed))
    q, k = mixer.queries_and_keys(z, context(z))
    factor = mixer.temperature.exp() if mixer.exponential else mixer.temperature
    torch.testing.assert_close(q.norm(dim=-1), torch.ones(q.shape[:-1], dtype=q.dtype), atol=1e-9, rtol=0)
    torch.testing.assert_close(k.norm(dim=-1), factor.abs().expand(k.shape[:-1]), atol=1e-9, rtol=0)
    # The module attends with scale sqrt(d): the same scores as vectors of length sqrt(d) and scale 1 / sqrt(d).
    k = k.repeat_interleave(mixer.heads // mixer.kv_heads, dim=2)
    scores = math.sqrt(mixer.head_dim) * torch.einsum("bthd,bshd->bhts", q, k)
    bound = factor.abs().repeat_interleave(mixer.heads // mixer.kv_heads) * math.sqrt(mixer.head_dim)
    assert (scores.abs() <= bound[:, None, None] + 1e-9).all()


def query_key_mean(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each query head [B, T, H, d] averaged with its key head [B, T, HKV, d], and that averaged over the group."""
    grouped = (q.unflatten(2, (k.shape[2], -1)) + k[:, :, :, None]) / 2
    return grouped.flatten(2, 3), grouped.mean(dim=3)


def test_cca_mean_of_keys_is_half_the_queries_mean_and_half_the_key() -> None:
    q, k = draw(2, 5, 6, 4), draw(2, 5, 2, 4, seed=1)
    q_mean, k_mean = query_key_mean(q, k)
    torch.testing.assert_close(k_mean, (q.view(2, 5, 2, 3, 4).mean(dim=3) + k) / 2, atol=1e-12, rtol=0)
    for head in range(6):
        torch.testing.assert_close(q_mean[:, :, head], (q[:, :, head] + k[:, :, head // 3]) / 2, atol=1e-12, rtol=0)


@CCAS
@pytest.mark.parametrize("c", [0.1, 30.0])
def test_cca_without_biases_does_not_feel_the_scale_of_its_projections(name: str, c: float) -> None:
    mixer = build(name)
    assert isinstance(mixer, CCA)
    with torch.no_grad():
        mixer.depthwise_bias.zero_()
        mixer.grouped_bias.zero_()
    z = draw(2, 10, sum(mixer.mixed))
    ours, scaled = (mixer.queries_and_keys(x, context(x)) for x in (z, c * z))
    for a, b in zip(ours, scaled):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=0)


def test_cca_scores_depend_on_distances_only() -> None:
    mixer = build("cca")
    assert isinstance(mixer, CCA)
    z = draw(1, 10, sum(mixer.mixed))
    q, k = mixer.queries_and_keys(z, context(z))
    k = k.repeat_interleave(2, dim=2)
    scores = []
    for offset in (0, 5):
        cos, sin = context(z, offset).rotary(mixer.rotary_dim, mixer.rope_theta)
        scores.append(torch.einsum("bthd,bshd->bhts", apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-6, rtol=0)  # sines and cosines are fp32
    assert mixer.rotary_dim == 2  # 0.34 of 6 channels
    unrotated = torch.einsum("bthd,bshd->bhts", q, k)
    assert (scores[0] - unrotated).abs().max() > 0.1


def test_cca_delays_the_second_half_of_the_values() -> None:
    """Two key heads: the first reads the current token, the second the one before, zeros at the start."""
    mixer = build("cca")
    assert isinstance(mixer, CCA)
    with torch.no_grad():
        mixer.out.weight.copy_(torch.eye(WIDTH))
    x = draw(1, 6, WIDTH)
    y = call(mixer, x).unflatten(-1, (4, 6))
    current, delayed = (x @ mixer.qkv.weight[-12:].T).split(6, dim=-1)
    torch.testing.assert_close(y[0, 0, :2], current[0, 0].expand(2, -1), atol=1e-12, rtol=0)
    assert y[0, 0, 2:].abs().max() == 0  # the first token's delayed value is zero
    # At the second token, the delayed heads mix zero and the first token's value: multiples of it.
    ratio = y[0, 1, 2:] / delayed[0, 0]
    torch.testing.assert_close(ratio, ratio[:, :1].expand(-1, 6), atol=1e-9, rtol=0)


def test_cca_cache_holds_two_columns_and_one_delayed_value() -> None:
    mixer = build("cca")
    cache: dict[str, Any] = {}
    with torch.no_grad():
        call(mixer, draw(2, 7, WIDTH), cache=cache)
        assert {key: tuple(value.shape) for key, value in cache.items()} == {
            "columns": (2, 2, 36), "v_delayed": (2, 1, 6), "k": (2, 7, 2, 6), "v": (2, 7, 2, 6),
        }  # fmt: skip
        for name in ("columns", "v_delayed"):
            assert cache[name].untyped_storage().nbytes() == cache[name].nbytes  # not a view of the whole prompt


# Latent attention


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("mla")])
def test_mla_absorbed_form_is_the_expanded_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = build(name), draw(2, 9, WIDTH)
    assert isinstance(mixer, MLA)
    results = []
    for absorbing in (True, False):
        monkeypatch.setattr(mixer, "_absorbing", lambda T, S, choice=absorbing: choice)
        leaf = x.clone().requires_grad_()
        y = call(mixer, leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, *mixer.parameters()], draw(2, 9, WIDTH, seed=1))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_mla_absorbs_single_tokens_and_expands_prompts() -> None:
    mixer = MLAConfig(heads=32, kv_rank=512).build(64)
    assert mixer._absorbing(1, 2) and mixer._absorbing(1, 100_000) and mixer._absorbing(64, 4096)
    assert not mixer._absorbing(4096, 4096) and not mixer._absorbing(4096, 8192)


@pytest.mark.parametrize("name", ["mla", "mla, rotated"])
def test_mla_cache_holds_latents_only(name: str) -> None:
    cache: dict[str, Any] = {}
    with torch.no_grad():
        call(build(name), draw(2, 7, WIDTH), cache=cache)
    assert {key: tuple(value.shape) for key, value in cache.items()} == {"latent": (2, 7, 8 + 4)}


def test_mla_without_rope_knows_no_positions() -> None:
    """The last token's output does not feel the order of those before it; with rope it does."""
    x = draw(1, 8, WIDTH)
    shuffled = torch.cat((x[:, [3, 0, 6, 1, 5, 2, 4]], x[:, 7:]), dim=1)
    for name, feels in (("mla", False), ("mla, rotated", True)):
        mixer = build(name)
        difference = (call(mixer, x)[:, -1] - call(mixer, shuffled)[:, -1]).abs().max()
        assert (difference > 1e-4) == feels and (difference < 1e-12) != feels
