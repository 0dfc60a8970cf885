"""The linear-time mixers by themselves: causality, packing, caches, gradients, counts, refusals."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain.model.mixers.delta_net import DeltaNetConfig
from pretrain.model.mixers.gated_delta_net import GatedDeltaNetConfig
from pretrain.model.mixers.gated_linear_attention import GatedLinearAttention, GatedLinearAttentionConfig
from pretrain.model.mixers.hgrn2 import HGRN2, HGRN2Config
from pretrain.model.mixers.kimi_delta_attention import KimiDeltaAttentionConfig
from pretrain.model.mixers.linear_attention import LinearAttentionConfig
from pretrain.model.mixers.mamba import Mamba, MambaConfig
from pretrain.model.mixers.mamba2 import Mamba2Config
from pretrain.model.mixers.retnet import RetNetConfig
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import Mixer, MixerConfig, by_kind, init_normal

WIDTH = 12
GROUPED: dict[str, int] = {"heads": 2, "value_heads": 4, "head_dim": 5, "value_dim": 3}
CONFIGS: dict[str, MixerConfig] = {
    "gdn": GatedDeltaNetConfig(**GROUPED),
    "gdn, no decay": GatedDeltaNetConfig(heads=2, head_dim=5, gate_decay=False, negative_eigenvalues=True),
    "delta_net": DeltaNetConfig(heads=2, head_dim=5, conv_width=1),
    "delta_net, gated": DeltaNetConfig(**GROUPED, output_gate=True, negative_eigenvalues=True),
    "kda": KimiDeltaAttentionConfig(heads=2, head_dim=5),
    "kda, safe": KimiDeltaAttentionConfig(**GROUPED, safe_gate=True, rank=4, output_gate_bias=True, conv_width=2),
    "gla": GatedLinearAttentionConfig(heads=2),
    "gla, convolved": GatedLinearAttentionConfig(heads=3, head_dim=5, conv_width=4, gate_rank=2, gate_bias=3.0),
    "hgrn2": HGRN2Config(heads=2),
    "hgrn2, bounded": HGRN2Config(heads=2, head_dim=5, conv_width=3, lower_bound=0.7, norm_per_head=True),
    "retnet": RetNetConfig(heads=3),
    "retnet, convolved": RetNetConfig(heads=2, head_dim=4, value_dim=5, center=False, conv_width=3),
    "linear_attention": LinearAttentionConfig(heads=2),
    "linear_attention, convolved": LinearAttentionConfig(heads=2, feature_map="relu", conv_width=3),
    "mamba2": Mamba2Config(head_dim=4, state_dim=5),
    "mamba2, grouped": Mamba2Config(
        head_dim=4, state_dim=5, groups=3, bias=True, conv_bias=False, norm_first=True, dt_limits=(0.01, 0.5)
    ),
    "mamba": MambaConfig(state_dim=5),
    "mamba, biased": MambaConfig(expand=1.5, state_dim=3, dt_rank=4, bias=True, conv_bias=False, conv_width=2),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)
BORDERS = [0, 1, 3, 20, 20, 85, 88]  # sequences shorter than a convolution, an empty one, one longer than a chunk


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(name: str) -> Mixer:
    """The mixer in fp64, no parameter at a special value."""
    torch.manual_seed(0)
    mixer = CONFIGS[name].build(WIDTH).double()
    with torch.no_grad():
        for seed, parameter in enumerate(mixer.parameters()):
            parameter.add_(draw(*parameter.shape, seed=seed) * 0.3)
    return mixer


def run(mixer: Mixer, x: Tensor, cu_seqlens: Tensor | None = None, offset: int = 0, cache: Any = None) -> Tensor:
    return mixer(x, SequenceContext.of(x[..., 0], cu_seqlens, offset), cache)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def test_every_kind_is_found() -> None:
    union = TypeAdapter(by_kind("pretrain.model.mixers", MixerConfig))
    for config in CONFIGS.values():
        assert union.validate_python(config.model_dump()) == config


@EVERY
def test_later_tokens_change_no_bit_of_earlier_outputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_KERNELS", "reference")
    mixer, x = build(name), draw(2, 14, WIDTH)
    changed = x.clone()
    changed[:, 9] += draw(2, WIDTH, seed=1)
    difference = (run(mixer, changed) - run(mixer, x)).abs().amax(dim=(0, 2))
    assert difference[:9].max() == 0
    assert difference[9:].min() > 1e-6


@EVERY
def test_later_tokens_do_not_change_earlier_outputs(name: str) -> None:
    """The fast forms choose how to factor a chunk's decays by all of its tokens, which moves last bits."""
    mixer, x = build(name), draw(2, 80, WIDTH)
    before = run(mixer, x)
    changed = x.clone()
    changed[:, 50:] = draw(2, 30, WIDTH, seed=1)
    after = run(mixer, changed)
    assert relative(after[:, :50], before[:, :50]) < 1e-11
    assert (after - before)[:, 50:].abs().amax(dim=(0, 2)).min() > 1e-3


@EVERY
def test_packed_sequences_are_computed_as_if_alone(name: str) -> None:
    mixer, x = build(name), draw(1, BORDERS[-1], WIDTH).requires_grad_()
    packed = run(mixer, x, torch.tensor(BORDERS, dtype=torch.int32))
    alone = torch.cat([run(mixer, x[:, start:end]) for start, end in pairwise(BORDERS) if end > start], dim=1)
    assert relative(packed, alone) < 1e-11
    (gradient,) = torch.autograd.grad(packed[:, 20:85].square().sum(), x)
    assert gradient[:, :20].abs().max() == 0 and gradient[:, 85:].abs().max() == 0
    assert gradient[:, 20:85].abs().amax(dim=-1).min() > 0


@EVERY
@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("pieces", [[1] * 8, [3, *[1] * 5], [20, 1, 64, 1, 1, 2]])
def test_pieces_with_a_cache_equal_the_whole(name: str, pieces: list[int], recording: bool) -> None:
    mixer, x = build(name), draw(2, sum(pieces), WIDTH)
    whole = run(mixer, x)
    cache: dict[str, Any] = {}
    parts, offset = [], 0
    with torch.set_grad_enabled(recording):
        for piece in x.split(pieces, dim=1):
            parts.append(run(mixer, piece, offset=offset, cache=cache))
            offset += piece.shape[1]
    assert relative(torch.cat(parts, dim=1), whole) < 1e-11


@EVERY
def test_the_cache_does_not_grow(name: str) -> None:
    mixer, cache, sizes = build(name), dict[str, Any](), []
    for position in range(6):
        run(mixer, draw(2, 1, WIDTH), offset=position, cache=cache)
        sizes.append({key: value.shape for key, value in cache.items()})
    assert sizes == [sizes[0]] * 6
    assert set(cache) == ({"memory", "conv"} if getattr(mixer, "conv", None) is not None else {"memory"})


@EVERY
def test_every_parameter_gets_a_gradient(name: str) -> None:
    mixer = build(name)
    run(mixer, draw(2, 20, WIDTH)).square().sum().backward()
    silent = [key for key, value in mixer.named_parameters() if value.grad is None or not value.grad.any()]
    assert silent == []


@EVERY
def test_bf16_autocast(name: str) -> None:
    mixer, x = build(name).float(), draw(2, 70, WIDTH).float()
    expected = run(mixer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(mixer, x)
        cache: dict[str, Any] = {}
        with torch.no_grad():
            stepped = [run(mixer, x[:, :66], cache=cache)]
            stepped += [run(mixer, x[:, t : t + 1], offset=t, cache=cache) for t in range(66, 70)]
    assert y.dtype == torch.bfloat16 and cache["memory"].dtype == torch.float32
    rms = expected.square().mean().sqrt()
    assert (y - expected).square().mean().sqrt() < 0.05 * rms
    assert (torch.cat(stepped, dim=1) - expected).square().mean().sqrt() < 0.05 * rms
    y.float().square().sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in mixer.parameters())


D = WIDTH
PARAMETERS = {
    # qkv, conv, out, norm, then what the kind adds: H K = 10, HV V = 12 (grouped) or 10
    "gdn": D * 32 + 32 * 4 + 12 * D + 3 + D * 12 + D * 4 * 2 + 4 + 4,
    "gdn, no decay": D * 30 + 30 * 4 + 10 * D + 5 + D * 10 + D * 2,
    "delta_net": D * 30 + 30 + 10 * D + 5 + D * 2,
    "delta_net, gated": D * 32 + 32 * 4 + 12 * D + 3 + D * 12 + D * 4,
    "kda": D * 30 + 30 * 4 + 10 * D + 5 + D * 2 + 2 * (D * 5 + 5 * 10) + 2 + 10,
    "kda, safe": D * 32 + 32 * 2 + 12 * D + 3 + D * 4 + (D * 4 + 4 * 12 + 12) + (D * 4 + 4 * 20) + 4 + 20,
    # q and k have D / 2 channels, v and the gate D
    "gla": D * (6 + 6 + 12) + 12 * D + 6 + D * 12 + (D * 16 + 16 * 6 + 6),
    "gla, convolved": D * (15 + 15 + 12) + 42 * 4 + 12 * D + 4 + D * 12 + (D * 2 + 2 * 15 + 15),
    "hgrn2": D * 36 + 12 * D + 12,
    "hgrn2, bounded": D * (10 + 10 + 12) + 32 * 3 + 12 * D + 6,
    "retnet": D * (12 + 12 + 24) + 24 * D + 8 + D * 24,
    "retnet, convolved": D * (8 + 8 + 10) + 26 * 3 + 10 * D + 5 + D * 10,
    "linear_attention": D * 36 + 12 * D + 6,
    "linear_attention, convolved": D * 36 + 36 * 3 + 12 * D + 6,
    # 24 inner channels, 6 heads: z, x, B, C, dt in; conv and its bias; A_log, dt_bias, D; norm; out
    "mamba2": D * (24 + 34 + 6) + 34 * 5 + 3 * 6 + 24 + 24 * D,
    "mamba2, grouped": (D + 1) * (24 + 54 + 6) + 54 * 4 + 3 * 6 + 24 + 24 * D + D,
    "mamba": D * 48 + 24 * 5 + 24 * (1 + 10) + 24 + 24 + 24 * 5 + 24 + 24 * D,
    "mamba, biased": (D + 1) * 36 + 18 * 2 + 18 * (4 + 6) + 4 * 18 + 18 + 18 * 3 + 18 + 18 * D + D,
}
# Convolution 2 C W, and the recurrence by state entry: decay 1, read of the old value 2, write 2, read 2.
RECURRENCE = {
    "gdn": 2 * 32 * 4 + 7 * 4 * 5 * 3,
    "gdn, no decay": 2 * 30 * 4 + 6 * 2 * 5 * 5,
    "delta_net": 2 * 30 + 6 * 2 * 5 * 5,
    "delta_net, gated": 2 * 32 * 4 + 6 * 4 * 5 * 3,
    "kda": 2 * 30 * 4 + 7 * 2 * 5 * 5,
    "kda, safe": 2 * 32 * 2 + 7 * 4 * 5 * 3,
    "gla": 5 * 2 * 3 * 6,
    "gla, convolved": 2 * 42 * 4 + 5 * 3 * 5 * 4,
    "hgrn2": 5 * 2 * 6 * 6,
    "hgrn2, bounded": 2 * 32 * 3 + 5 * 2 * 5 * 6,
    "retnet": 5 * 3 * 4 * 8,
    "retnet, convolved": 2 * 26 * 3 + 5 * 2 * 4 * 5,
    "linear_attention": 4 * 2 * 6 * 6,
    "linear_attention, convolved": 2 * 36 * 3 + 4 * 2 * 6 * 6,
    "mamba2": 2 * 34 * 4 + 5 * 24 * 5 + 3 * 24,
    "mamba2, grouped": 2 * 54 * 4 + 5 * 24 * 5 + 3 * 24,
    "mamba": 2 * 24 * 4 + 6 * 24 * 5 + 4 * 24,
    "mamba, biased": 2 * 18 * 2 + 6 * 18 * 3 + 4 * 18,
}


@EVERY
def test_parameters_by_hand(name: str) -> None:
    mixer = CONFIGS[name].build(WIDTH)
    assert sum(parameter.numel() for parameter in mixer.parameters()) == PARAMETERS[name]
    assert mixer.active_parameters() == PARAMETERS[name]
    (out,) = mixer.output_projections()
    assert out.shape[0] == WIDTH


@EVERY
def test_flops_are_the_measured_projections_and_the_recurrence_by_hand(name: str) -> None:
    mixer, tokens = CONFIGS[name].build(WIDTH), 10
    with FlopCounterMode(display=False) as counter:
        run(mixer, draw(1, tokens, WIDTH).float())
    counts = counter.get_flop_counts()
    root = type(mixer).__name__
    dense = [f"{root}.{key}" for key, part in mixer.named_modules() if isinstance(part, nn.Linear)]
    projections = sum(sum(counts[key].values()) for key in dense) / tokens
    assert mixer.flops_per_token(7.0) == projections + RECURRENCE[name] > 0
    assert mixer.flops_per_token(7.0) == mixer.flops_per_token(7e5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GatedDeltaNetConfig(heads=2, value_heads=3), "value_heads=3 is not a multiple of heads=2"),
        (DeltaNetConfig(heads=2, value_heads=3), "value_heads=3 is not a multiple of heads=2"),
        (KimiDeltaAttentionConfig(heads=2, value_heads=3), "value_heads=3 is not a multiple of heads=2"),
        (GatedLinearAttentionConfig(heads=4), r"heads=4 does not divide 0.5 \* width = 6; set head_dim"),
        (GatedLinearAttentionConfig(heads=5, head_dim=3), r"heads=5 does not divide 1 \* width = 12; set value_dim"),
        (HGRN2Config(heads=5), "heads=5 does not divide"),
        (RetNetConfig(heads=24), "heads=24 does not divide"),
        (RetNetConfig(heads=4), "head_dim=3 is odd"),
        (LinearAttentionConfig(heads=5), "heads=5 does not divide"),
        (Mamba2Config(head_dim=5), r"head_dim=5 does not divide expand \* width = 24"),
        (Mamba2Config(head_dim=4, groups=4), "groups=4 does not divide the 6 heads"),
        (MambaConfig(expand=0.01), "expand=0.01 leaves no channel of width=12"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config: MixerConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.build(WIDTH)


@pytest.mark.parametrize(
    ("config", "values", "field"),
    [
        (KimiDeltaAttentionConfig, {"heads": 1, "lower_bound": 0.0}, "lower_bound"),
        (HGRN2Config, {"heads": 1, "lower_bound": 1.0}, "lower_bound"),
        (GatedLinearAttentionConfig, {"gate_normalizer": 0.0}, "gate_normalizer"),
        (LinearAttentionConfig, {"heads": 1, "feature_map": "exp"}, "feature_map"),
        (Mamba2Config, {"dt_limits": (0.5, 0.1)}, "dt_limits"),
        (Mamba2Config, {"dt_limits": (-1.0, 0.1)}, "dt_limits"),
        (GatedDeltaNetConfig, {"heads": 0}, "heads"),
    ],
)
def test_values_out_of_range_are_refused(config: type[MixerConfig], values: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        config(**values)


def test_names_of_gated_delta_net_stay() -> None:
    names = {
        "qkv.weight",
        "gate.weight",
        "beta.weight",
        "conv",
        "norm",
        "out.weight",
        "decay.weight",
        "A_log",
        "dt_bias",
    }
    assert set(build("gdn").state_dict()) == names


def test_gated_delta_net_without_decay_is_a_gated_delta_net() -> None:
    decayless = GatedDeltaNetConfig(**GROUPED, gate_decay=False, norm_eps=1e-5, negative_eigenvalues=True)
    mixer, other = build("delta_net, gated"), decayless.build(WIDTH).double()
    other.load_state_dict(mixer.state_dict())
    x = draw(2, 20, WIDTH)
    assert torch.equal(run(mixer, x), run(other, x))


def test_lower_bound_of_hgrn2_rises_with_depth_unless_it_is_given() -> None:
    rising, fixed = build("hgrn2"), build("hgrn2, bounded")
    assert isinstance(rising, HGRN2) and isinstance(fixed, HGRN2)
    bounds = []
    for index in range(4):
        rising.place(index, 4)
        fixed.place(index, 4)
        bounds.append(rising.lower_bound)
    assert bounds == [0.0, 0.25, 0.5, 0.75] and fixed.lower_bound == 0.7
    x = draw(1, 8, WIDTH)
    upper = run(rising, x)
    rising.place(0, 4)
    assert relative(run(rising, x), upper) > 0.01


def test_laws_of_their_own_survive_the_decoders_initialisation() -> None:
    gla, mamba = build("gla, convolved"), build("mamba")
    for mixer in (gla, mamba):
        init_normal(mixer, 0.02)
        for module in mixer.modules():
            if hasattr(module, "init_weights"):
                module.init_weights(0.02)
    assert isinstance(gla, GatedLinearAttention) and isinstance(mamba, Mamba)
    assert (gla.decay.up.bias == 3.0).all()
    assert 0.5 < mamba.dt_proj.weight.abs().max() <= 1.0  # one input: uniform within 1


@EVERY
def test_initial_decays_and_steps(name: str) -> None:
    torch.manual_seed(0)
    mixer = CONFIGS[name].build(WIDTH)
    if hasattr(mixer, "dt_bias"):
        step = torch.nn.functional.softplus(mixer.dt_bias)
        assert step.min() >= 1e-4 and step.max() <= 0.1001
    if hasattr(mixer, "A_log"):
        rate = mixer.A_log.exp()
        assert rate.min() > 0 and rate.max() <= 16.0
    x = draw(2, 64, WIDTH).float()
    assert run(mixer, x).isfinite().all()
