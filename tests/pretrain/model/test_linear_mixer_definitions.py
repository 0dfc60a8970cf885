"""The linear-time mixers equal their papers' equations, computed token by token and head by head in fp64.

Those that transformers has as well (Gated DeltaNet, KDA, Mamba-2, Mamba) are compared with it in tests/oracles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.model.mixers.delta_net import DeltaNet, DeltaNetConfig
from pretrain.model.mixers.gated_linear_attention import GatedLinearAttention, GatedLinearAttentionConfig
from pretrain.model.mixers.hgrn2 import HGRN2, HGRN2Config
from pretrain.model.mixers.kimi_delta_attention import KimiDeltaAttention, KimiDeltaAttentionConfig
from pretrain.model.mixers.linear_attention import LinearAttention, LinearAttentionConfig
from pretrain.model.mixers.mamba2 import Mamba2, Mamba2Config
from pretrain.model.mixers.retnet import RetNet, RetNetConfig
from pretrain.model.sequence import SequenceContext

WIDTH, T = 12, 23
TOLERANCE = 1e-6  # decays pass through fp32 in some kernels


def randomised(mixer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.double().parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    return mixer


def tokens() -> Tensor:
    return torch.randn(1, T, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def check(mixer: nn.Module, expected: Callable[[Tensor], Tensor]) -> None:
    x = tokens()
    y, wanted = mixer(x, SequenceContext.of(x[..., 0], None))[0], expected(x[0])
    assert y.shape == wanted.shape
    error = ((y - wanted).abs().max() / wanted.abs().max()).item()
    assert error < TOLERANCE, f"relative error {error:.2e}"


def memory(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None = None) -> Tensor:
    """One head: q, k, decay [T, K], v [T, V], beta [T] -> o [T, V]. With beta the write corrects, without it adds."""
    state = torch.zeros(k.shape[1], v.shape[1], dtype=q.dtype)
    outputs = []
    for t in range(q.shape[0]):
        state = decay[t][:, None] * state
        write = v[t] if beta is None else beta[t] * (v[t] - state.T @ k[t])
        state = state + torch.outer(k[t], write)
        outputs.append(state.T @ q[t] / math.sqrt(k.shape[1]))
    return torch.stack(outputs)


def rms(o: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return o / (o.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def projections(mixer: Any, x: Tensor, silu_conv: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [T, heads, channels], through a convolution written as a sum over taps where there is one."""
    mixed = x @ mixer.qkv.weight.T
    if silu_conv:
        taps = mixer.conv.shape[1]
        padded = F.pad(mixed, (0, 0, taps - 1, 0))
        mixed = F.silu(sum(padded[i : i + T] * mixer.conv[:, i] for i in range(taps)))
    q, k, v = mixed.split(mixer.sections, dim=-1)
    return (
        q.unflatten(-1, (mixer.heads, -1)),
        k.unflatten(-1, (mixer.heads, -1)),
        v.unflatten(-1, (mixer.value_heads, -1)),
    )


def heads(count: int, one: Callable[[int], Tensor]) -> Tensor:
    return torch.stack([one(h) for h in range(count)], dim=1)


def test_gated_linear_attention() -> None:
    mixer = randomised(GatedLinearAttention(WIDTH, GatedLinearAttentionConfig(heads=2, gate_rank=3, gate_normalizer=4)))

    def expected(x: Tensor) -> Tensor:
        q, k, v = projections(mixer, x)
        logits = (x @ mixer.decay.down.weight.T) @ mixer.decay.up.weight.T + mixer.decay.up.bias
        decay = logits.sigmoid().pow(1 / 4).unflatten(-1, (2, 3))
        o = heads(2, lambda h: memory(q[:, h], k[:, h], v[:, h], decay[:, h]))
        gate = F.silu(x @ mixer.gate.weight.T).unflatten(-1, (2, 6))
        return (rms(o, mixer.norm) * gate).flatten(-2) @ mixer.out.weight.T

    check(mixer, expected)


@pytest.mark.parametrize("bound", [0.0, 0.5])
def test_hgrn2(bound: float) -> None:
    mixer = randomised(HGRN2(WIDTH, HGRN2Config(heads=2, lower_bound=bound)))

    def expected(x: Tensor) -> Tensor:
        q, f, v = projections(mixer, x)
        forget = bound + (1 - bound) * f.sigmoid()
        o = heads(2, lambda h: memory(F.silu(q[:, h]), 1 - forget[:, h], v[:, h], forget[:, h]))
        return rms(o.flatten(-2), mixer.norm) @ mixer.out.weight.T

    check(mixer, expected)


@pytest.mark.parametrize("center", [True, False])
def test_retnet(center: bool) -> None:
    mixer = randomised(RetNet(WIDTH, RetNetConfig(heads=3, center=center, rope_theta=50.0)))

    def turn(x: Tensor) -> Tensor:
        """Channels (i, i + 2) as complex numbers, times exp(i t theta^(-i/2))."""
        angle = torch.arange(T)[:, None] * torch.tensor([1.0, 50.0**-0.5], dtype=torch.float64)
        turned = torch.complex(x[:, :2], x[:, 2:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag), dim=-1)

    def expected(x: Tensor) -> Tensor:
        q, k, v = projections(mixer, x)
        gamma = [1 - 2.0 ** (-5 - h) for h in range(3)]
        decay = [torch.full((T, 4), rate, dtype=torch.float64) for rate in gamma]
        o = heads(3, lambda h: memory(turn(q[:, h]), turn(k[:, h]), v[:, h], decay[h]))
        if center:
            normed = F.group_norm(o.flatten(-2), 3, eps=1e-5).unflatten(-1, (3, 8)) * mixer.norm
        else:
            normed = rms(o, mixer.norm)
        return (normed.flatten(-2) * F.silu(x @ mixer.gate.weight.T)) @ mixer.out.weight.T

    check(mixer, expected)


def test_linear_attention_with_its_divisor() -> None:
    """The paper's divisor is written out here and left out there: the norm makes them equal, up to its eps."""
    mixer = randomised(LinearAttention(WIDTH, LinearAttentionConfig(heads=2, norm_eps=1e-30)))

    def expected(x: Tensor) -> Tensor:
        q, k, v = projections(mixer, x)
        q, k = F.elu(q) + 1, F.elu(k) + 1

        def one(h: int) -> Tensor:
            scores = (q[:, h] @ k[:, h].T).tril()
            return scores / scores.sum(-1, keepdim=True) @ v[:, h]

        return rms(heads(2, one), mixer.norm, 0.0).flatten(-2) @ mixer.out.weight.T

    check(mixer, expected)


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("negative", [False, True])
def test_delta_net(negative: bool) -> None:
    config = DeltaNetConfig(heads=2, value_heads=4, head_dim=5, value_dim=3, negative_eigenvalues=negative)
    mixer = randomised(DeltaNet(WIDTH, config))

    def expected(x: Tensor) -> Tensor:
        q, k, v = projections(mixer, x, silu_conv=True)
        beta = (x @ mixer.beta.weight.T).sigmoid() * (2 if negative else 1)
        keep = torch.ones(T, 5, dtype=torch.float64)
        o = heads(4, lambda j: memory(unit(q[:, j // 2]), unit(k[:, j // 2]), v[:, j], keep, beta[:, j]))
        return rms(o, mixer.norm).flatten(-2) @ mixer.out.weight.T

    check(mixer, expected)


@pytest.mark.parametrize("safe", [True, False])
def test_kimi_delta_attention(safe: bool) -> None:
    sizes = {"heads": 2, "value_heads": 4, "head_dim": 5, "value_dim": 3, "rank": 4, "lower_bound": -3.0}
    config = KimiDeltaAttentionConfig(**sizes, safe_gate=safe, output_gate_bias=True)
    mixer = randomised(KimiDeltaAttention(WIDTH, config))

    def expected(x: Tensor) -> Tensor:
        q, k, v = projections(mixer, x, silu_conv=True)
        beta = (x @ mixer.beta.weight.T).sigmoid()
        logits = (x @ mixer.decay.down.weight.T) @ mixer.decay.up.weight.T + mixer.dt_bias
        logits, slope = logits.unflatten(-1, (4, 5)), mixer.A_log.exp()[:, None]
        g = -3.0 * (slope * logits).sigmoid() if safe else -slope * F.softplus(logits)
        o = heads(4, lambda j: memory(unit(q[:, j // 2]), unit(k[:, j // 2]), v[:, j], g[:, j].exp(), beta[:, j]))
        gate = (x @ mixer.gate.down.weight.T) @ mixer.gate.up.weight.T + mixer.gate.up.bias
        return (rms(o, mixer.norm).flatten(-2) * gate.sigmoid()) @ mixer.out.weight.T

    check(mixer, expected)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_order_of_mamba2s_norm_and_gate(groups: int, norm_first: bool) -> None:
    mixer = Mamba2(WIDTH, Mamba2Config(head_dim=4, state_dim=5, groups=groups, norm_first=norm_first))
    randomised(mixer)
    y, gate = (torch.randn(3, 24, dtype=torch.float64) for _ in range(2))

    def norm(o: Tensor) -> Tensor:
        return rms(o.unflatten(-1, (groups, -1)), torch.ones(())).flatten(-2) * mixer.norm

    expected = norm(y) * F.silu(gate) if norm_first else norm(y * F.silu(gate))
    torch.testing.assert_close(mixer._gated_norm(y, gate), expected)
