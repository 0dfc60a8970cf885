"""The linear-time mixers against the layer classes of transformers: same weights, same outputs, also token by token.

Each `export_*` writes down the correspondence of weights that a converter needs. Agreement is that of two fp32 programs
that sum in another order: 1e-6 or so of the outputs' scale; the bound is 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launch.step_bench.models import torch_forms
from pretrain.model.mixers.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from pretrain.model.mixers.kimi_delta_attention import KimiDeltaAttention, KimiDeltaAttentionConfig
from pretrain.model.mixers.mamba import Mamba, MambaConfig
from pretrain.model.mixers.mamba2 import Mamba2, Mamba2Config
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import Mixer

TOLERANCE = 1e-5
WIDTH, T, STEPS = 18, 71, 4  # 71 tokens are no multiple of a chunk


def peer(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modeling module, with its plain torch forms in place of the GPU kernels of packages that are installed."""
    module = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    for key, function in torch_forms(module).items():
        monkeypatch.setattr(module, key, function)
    return module


def config_of(name: str, **values: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    common = {"hidden_size": WIDTH, "num_hidden_layers": 2, "vocab_size": 8}
    return getattr(transformers, name)(**common, **values)


@torch.no_grad()
def shake(module: nn.Module, seed: int = 0) -> None:
    """Random values for every parameter: the defaults (ones, zeros) would hide what is not copied."""
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        scale = 0.4 if parameter.ndim > 1 else 0.3
        noise = torch.randn_like(parameter) * scale
        is_scale = name.endswith(("norm", "norm.weight", "D"))
        parameter.copy_(1.0 + noise if is_scale else noise)


def compare(ours: Mixer, theirs: nn.Module, config: Any, output: Callable[[Any], Tensor] = lambda y: y) -> None:
    """Equal outputs for whole rows, and for a prompt followed by single tokens, each with its own cache."""
    from transformers import DynamicCache

    ours.eval(), theirs.eval()
    torch.manual_seed(1)
    x = torch.randn(2, T, WIDTH)
    with torch.no_grad():
        expected = output(theirs(x))
        assert_close(ours(x, context(x, 0)), expected)
        theirs_cache, ours_cache = DynamicCache(config=config), {}
        prompt = T - STEPS
        pieces = [(0, prompt), *((t, t + 1) for t in range(prompt, T))]
        for start, end in pieces:
            piece = x[:, start:end]
            y = output(theirs(piece, cache_params=theirs_cache))
            assert_close(ours(piece, context(piece, start), ours_cache), y)
            assert_close(y, expected[:, start:end])


def context(x: Tensor, offset: int) -> SequenceContext:
    return SequenceContext.of(x[..., 0], None, offset)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error < TOLERANCE, f"relative error {error:.2e}"


# Gated DeltaNet ------------------------------------------------------------------------------------------------------


def export_gated_delta_net(ours: GatedDeltaNet) -> dict[str, Tensor]:
    """Names that Qwen3-Next and OLMo Hybrid share."""
    return {"A_log": ours.A_log, "dt_bias": ours.dt_bias, "conv1d.weight": ours.conv[:, None]}


def export_qwen3_next(ours: GatedDeltaNet) -> dict[str, Tensor]:
    """Rows grouped by key head: [q, k, v of its value heads, gate of its value heads] and [beta, decay]."""
    q, k, v = ours.qkv.weight.split(ours.sections)

    def by_key_head(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (ours.heads, -1))

    assert ours.gate is not None
    qkvz = torch.cat([by_key_head(part) for part in (q, k, v, ours.gate.weight)], dim=1)
    ba = torch.cat([by_key_head(part) for part in (ours.beta.weight, ours.decay.weight)], dim=1)
    return export_gated_delta_net(ours) | {
        "in_proj_qkvz.weight": qkvz.flatten(0, 1),
        "in_proj_ba.weight": ba.flatten(0, 1),
        "norm.weight": ours.norm,
        "out_proj.weight": ours.out.weight,
    }


def export_olmo_hybrid(ours: GatedDeltaNet) -> dict[str, Tensor]:
    assert ours.gate is not None
    q, k, v = ours.qkv.weight.split(ours.sections)
    return export_gated_delta_net(ours) | {
        "q_proj.weight": q,
        "k_proj.weight": k,
        "v_proj.weight": v,
        "a_proj.weight": ours.decay.weight,
        "b_proj.weight": ours.beta.weight,
        "g_proj.weight": ours.gate.weight,
        "o_norm.weight": ours.norm,
        "o_proj.weight": ours.out.weight,
    }


SIZES = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "linear_conv_kernel_dim": 3,
    "num_attention_heads": 2,
}
OURS: dict[str, Any] = {"heads": 2, "value_heads": 6, "head_dim": 5, "value_dim": 7, "conv_width": 3}


def test_qwen3_next(monkeypatch: pytest.MonkeyPatch) -> None:
    module = peer("qwen3_next", monkeypatch)
    config = config_of("Qwen3NextConfig", **SIZES, layer_types=["linear_attention", "full_attention"])
    theirs = module.Qwen3NextGatedDeltaNet(config, 0)
    ours = GatedDeltaNet(WIDTH, GatedDeltaNetConfig(**OURS))
    shake(ours)
    theirs.load_state_dict(export_qwen3_next(ours))
    compare(ours, theirs, config)


@pytest.mark.parametrize("negative", [False, True])
def test_olmo_hybrid(monkeypatch: pytest.MonkeyPatch, negative: bool) -> None:
    module = peer("olmo_hybrid", monkeypatch)
    types = ["linear_attention", "full_attention"]
    config = config_of("OlmoHybridConfig", **SIZES, layer_types=types, linear_allow_neg_eigval=negative)
    theirs = module.OlmoHybridGatedDeltaNet(config, 0)
    ours = GatedDeltaNet(WIDTH, GatedDeltaNetConfig(**OURS, negative_eigenvalues=negative, norm_eps=1e-5))
    shake(ours)
    theirs.load_state_dict(export_olmo_hybrid(ours))
    compare(ours, theirs, config)


# Kimi Delta Attention ------------------------------------------------------------------------------------------------


def export_kimi_linear(ours: KimiDeltaAttention) -> dict[str, Tensor]:
    q, k, v = ours.qkv.weight.split(ours.sections)
    return {
        "q_proj.weight": q,
        "k_proj.weight": k,
        "v_proj.weight": v,
        "conv1d.weight": ours.conv[:, None],
        "forget_gate.f_a_proj.weight": ours.decay.down.weight,
        "forget_gate.f_b_proj.weight": ours.decay.up.weight,
        "forget_gate.dt_bias": ours.dt_bias,
        "forget_gate.A_log": ours.A_log.view(1, 1, -1, 1),
        "b_proj.weight": ours.beta.weight,
        "g_a_proj.weight": ours.gate.down.weight,
        "g_b_proj.weight": ours.gate.up.weight,
        "o_norm.weight": ours.norm,
        "o_proj.weight": ours.out.weight,
    }


def test_kimi_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    module = peer("kimi_linear", monkeypatch)
    config = config_of(
        "KimiLinearConfig",
        linear_head_dim=5,
        linear_num_heads=3,
        linear_conv_kernel_dim=3,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=3,
    )
    theirs = module.KimiLinearDeltaAttention(config, 0)
    ours = KimiDeltaAttention(WIDTH, KimiDeltaAttentionConfig(heads=3, head_dim=5, conv_width=3))
    shake(ours)
    theirs.load_state_dict(export_kimi_linear(ours))
    compare(ours, theirs, config)


# Mamba-2 and Mamba ---------------------------------------------------------------------------------------------------


def export_mamba2(ours: Mamba2) -> dict[str, Tensor]:
    """Equal up to names; biases where there are any."""
    named = {
        "A_log": ours.A_log,
        "D": ours.D,
        "dt_bias": ours.dt_bias,
        "conv1d.weight": ours.conv[:, None],
        "conv1d.bias": ours.conv_bias,
        "in_proj.weight": ours.in_proj.weight,
        "in_proj.bias": ours.in_proj.bias,
        "norm.weight": ours.norm,
        "out_proj.weight": ours.out.weight,
        "out_proj.bias": ours.out.bias,
    }
    return {name: value for name, value in named.items() if value is not None}


@pytest.mark.parametrize(
    ("groups", "options"),
    [
        (1, {}),
        (3, {}),
        (2, {"bias": True, "conv_bias": False}),
    ],
)
def test_mamba2(monkeypatch: pytest.MonkeyPatch, groups: int, options: dict[str, bool]) -> None:
    theirs, ours, config = mamba2(monkeypatch, groups, options)
    compare(ours, theirs, config)


def test_mamba2_step_size_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows only: their single-token path forgets the limits."""
    theirs, ours, _ = mamba2(monkeypatch, 1, {}, dt_limits=(0.5, 0.9))
    free, _, _ = mamba2(monkeypatch, 1, {})
    x = torch.randn(2, T, WIDTH)
    with torch.no_grad():
        assert_close(ours(x, context(x, 0)), theirs.eval()(x))
        assert (free.eval()(x) - theirs(x)).abs().max() > 1e-2 * theirs(x).abs().max()


def mamba2(
    monkeypatch: pytest.MonkeyPatch, groups: int, options: dict[str, bool], **limits: Any
) -> tuple[nn.Module, Mamba2, Any]:
    module = peer("mamba2", monkeypatch)
    config = config_of(
        "Mamba2Config",
        head_dim=3,
        num_heads=12,
        state_size=5,
        n_groups=groups,
        conv_kernel=3,
        chunk_size=16,
        use_bias=options.get("bias", False),
        use_conv_bias=options.get("conv_bias", True),
        time_step_limit=limits.get("dt_limits", (0.0, float("inf"))),
    )
    theirs = module.Mamba2Mixer(config, 0)
    sizes: dict[str, Any] = {"head_dim": 3, "state_dim": 5, "groups": groups, "conv_width": 3}
    ours = Mamba2(WIDTH, Mamba2Config(**sizes, **options, **limits))
    shake(ours)
    theirs.load_state_dict(export_mamba2(ours))
    return theirs, ours, config


def export_mamba(ours: Mamba) -> dict[str, Tensor]:
    named = {
        "A_log": ours.A_log,
        "D": ours.D,
        "conv1d.weight": ours.conv[:, None],
        "conv1d.bias": ours.conv_bias,
        "in_proj.weight": ours.in_proj.weight,
        "in_proj.bias": ours.in_proj.bias,
        "x_proj.weight": ours.x_proj.weight,
        "dt_proj.weight": ours.dt_proj.weight,
        "dt_proj.bias": ours.dt_bias,
        "out_proj.weight": ours.out.weight,
        "out_proj.bias": ours.out.bias,
    }
    return {name: value for name, value in named.items() if value is not None}


@pytest.mark.parametrize("options", [{}, {"bias": True, "conv_bias": False}])
def test_mamba(monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]) -> None:
    module = peer("mamba", monkeypatch)
    config = config_of(
        "MambaConfig",
        state_size=5,
        conv_kernel=3,
        time_step_rank=3,
        use_bias=options.get("bias", False),
        use_conv_bias=options.get("conv_bias", True),
    )
    theirs = module.MambaMixer(config, 0)
    ours = Mamba(WIDTH, MambaConfig(state_dim=5, conv_width=3, dt_rank=3, **options))
    shake(ours)
    theirs.load_state_dict(export_mamba(ours))
    compare(ours, theirs, config)
