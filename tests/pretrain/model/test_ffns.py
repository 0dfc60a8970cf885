"""What holds for every kind of FFN, and the dense kinds one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain.model.decoder import AnyFFN, Decoder
from pretrain.model.ffns.glu import BilinearConfig, GEGLUConfig
from pretrain.model.ffns.hourglass import Hourglass, HourglassConfig
from pretrain.model.ffns.kat import KAT, KATConfig
from pretrain.model.ffns.mlp import MLPConfig
from pretrain.model.ffns.parallel_ffn import ParallelFFN, ParallelFFNConfig, fuse
from pretrain.model.ffns.swiglu import SwiGLU, SwiGLUConfig
from pretrain.model.norm import RMSNorm
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import Carry, ContextualFFN, Sublayer, init_normal
from tests.pretrain.small import FFNS, decoder, tokens

WIDTH = 32
ALL = sorted(FFNS)


def build(name: str, **changes: Any) -> Sublayer:
    """An FFN of tests.pretrain.small alone, as the second layer of its definition, with large weights."""
    config = TypeAdapter(AnyFFN).validate_python({**FFNS[name], **changes})
    return drawn(config.build(WIDTH))


def drawn(ffn: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    ffn.place(1, 2)
    init_normal(ffn, 0.3)
    for module in ffn.modules():
        if hasattr(module, "init_weights"):
            module.init_weights(0.3)
    return ffn


def apply(ffn: Any, x: Tensor, cu_seqlens: Tensor | None = None, state: Tensor | None = None) -> Tensor:
    if not isinstance(ffn, ContextualFFN):
        return ffn(x)
    sequence = SequenceContext.of(torch.zeros(x.shape[:2], dtype=torch.int64), cu_seqlens)
    return ffn(x, sequence, None, Carry(state))[0]


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def state_of(ffn: Any, *shape: int) -> Tensor | None:
    router = getattr(ffn, "router", None)
    return random(*shape, router.down.out_features, seed=2) if hasattr(router, "gamma") else None


@pytest.mark.parametrize("name", ALL)
def test_gradient_reaches_every_parameter(name: str) -> None:
    ffn = build(name)
    apply(ffn, random(2, 40, WIDTH), state=state_of(ffn, 2, 40)).square().sum().backward()
    silent = [name for name, p in ffn.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_of_a_decoder_gets_a_gradient(name: str) -> None:
    model = decoder(ffns=FFNS, layers=[f"attention + {name} x2"])
    model(tokens(2, 50), targets=tokens(2, 50, seed=1)).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("name", ALL)
def test_bf16_autocast_is_finite_and_near_fp32(name: str) -> None:
    ffn, x = build(name).eval(), random(2, 20, WIDTH)
    state = state_of(ffn, 2, 20)
    exact = apply(ffn, x, state=state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = apply(ffn, x, state=state)
        y.float().square().mean().backward()
    assert (y - exact).norm() / exact.norm() < 0.03
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in ffn.parameters())


@pytest.mark.parametrize("name", ALL)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    ffn, x = build(name), random(1, 24, WIDTH)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        apply(ffn, x, state=state_of(ffn, 1, 24))
    counted = counter.get_total_flops() / 24
    assert counted == ffn.flops_per_token(0.0)


@pytest.mark.parametrize("name", ALL)
def test_position_wise(name: str) -> None:
    """Permuting tokens commutes, borders of packed sequences do not matter, and a token alone gets the same."""
    ffn, x = build(name).double().eval(), random(1, 30, WIDTH, dtype=torch.float64)
    state = state_of(ffn, 1, 30)
    y = apply(ffn, x, state=state)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    moved = apply(ffn, x[:, order], state=None if state is None else state[:, order])
    torch.testing.assert_close(moved, y[:, order], rtol=1e-10, atol=1e-10)
    cu_seqlens = torch.tensor([0, 1, 8, 30], dtype=torch.int32)
    torch.testing.assert_close(apply(ffn, x, cu_seqlens, state), y, rtol=0, atol=0)
    alone = apply(ffn, x[:, 7:8], state=None if state is None else state[:, 7:8])
    torch.testing.assert_close(alone, y[:, 7:8], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["qwen", "grouped", "zaya", "zaya_skip", "lifted", "kat"])
def test_decoding_equals_the_full_pass(name: str) -> None:
    model, row = decoder(ffns=FFNS, layers=[f"attention + {name} x2"]).double().eval(), tokens(2, 12)
    cache = model.new_cache()
    with torch.no_grad():
        parts = [model(piece, cache=cache) for piece in row.split([5, 1, 1, 4, 1], dim=1)]
        assert (torch.cat(parts, dim=1) - model(row)).abs().max() < 1e-5  # logits are fp32


@pytest.mark.parametrize("name", ALL)
def test_output_projections_scale_what_is_written(name: str) -> None:
    """With the written weights at zero the sublayer writes nothing: they are all of its ways to the stream."""
    ffn, x = build(name), random(1, 6, WIDTH)
    with torch.no_grad():
        for weight in ffn.output_projections():
            weight.zero_()
    assert torch.equal(apply(ffn, x), x if ffn.owns_residual else torch.zeros_like(x))


@pytest.mark.parametrize("name", [n for n in ALL if "experts" not in FFNS[n]])
def test_dense_ffns_use_all_parameters(name: str) -> None:
    ffn = build(name)
    assert ffn.active_parameters() == sum(p.numel() for p in ffn.parameters())


@pytest.mark.parametrize(
    ("config", "gate"),
    [
        (SwiGLUConfig(hidden=5), lambda h: h * h.sigmoid()),
        (GEGLUConfig(hidden=5), lambda h: h * 0.5 * (1 + torch.erf(h / 2**0.5))),
        (GEGLUConfig(hidden=5, tanh=True), lambda h: torch.nn.functional.gelu(h, approximate="tanh")),
        (BilinearConfig(hidden=5), lambda h: h),
    ],
)
def test_gated_units_by_hand(config: Any, gate: Any) -> None:
    ffn, x = drawn(config.build(8)), random(3, 8)
    w = ffn.gate_up.weight
    torch.testing.assert_close(ffn(x), (gate(x @ w[:5].T) * (x @ w[5:].T)) @ ffn.down.weight.T)


def test_bilinear_is_quadratic() -> None:
    ffn, x = drawn(BilinearConfig(hidden=5).build(8)), random(3, 8)
    torch.testing.assert_close(ffn(3.0 * x), 9.0 * ffn(x))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu2", "silu"])
def test_mlp_by_hand(activation: Any) -> None:
    by_hand = {
        "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / 2**0.5)),
        "gelu_tanh": lambda h: h * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))),
        "relu": lambda h: h.clamp(min=0),
        "relu2": lambda h: h.clamp(min=0) ** 2,
        "silu": lambda h: h * h.sigmoid(),
    }
    ffn, x = drawn(MLPConfig(hidden=6, activation=activation, bias=True).build(8)), random(3, 8)
    nn.init.normal_(ffn.up.bias)
    hidden = by_hand[activation](x @ ffn.up.weight.T + ffn.up.bias)
    torch.testing.assert_close(ffn(x), hidden @ ffn.down.weight.T + ffn.down.bias)


def test_hourglass_counts_follow_the_formula_and_match_a_swiglu() -> None:
    """3 K D d_h weights and K D norm scales; K d_h = d_ff costs what a SwiGLU of width d_ff costs."""
    stack, plain = HourglassConfig(hidden=12, depth=4).build(WIDTH), SwiGLUConfig(hidden=48).build(WIDTH)
    assert sum(p.numel() for p in stack.parameters()) == 3 * 4 * WIDTH * 12 + 4 * WIDTH
    assert stack.flops_per_token(0.0) == plain.flops_per_token(0.0)


def test_hourglass_stack_is_the_composition_of_single_stacks() -> None:
    stack, x = drawn(HourglassConfig(hidden=[3, 8, 5]).build(16)), random(2, 6, 16)
    y = x
    for norm, part in zip(stack.norms, stack.stack):
        single = HourglassConfig(hidden=part.down.in_features, depth=1).build(16)
        single.norms[0].load_state_dict(norm.state_dict())
        single.stack[0].load_state_dict(part.state_dict())
        y = single(y)
    torch.testing.assert_close(stack(x), y, rtol=0, atol=0)
    assert [part.down.in_features for part in stack.stack] == [3, 8, 5]


def test_hourglass_default_depth_and_contradiction() -> None:
    assert HourglassConfig(hidden=3).widths() == [3] * 4
    assert HourglassConfig(hidden=[3, 4], depth=2).widths() == [3, 4]
    with pytest.raises(ValueError, match="depth=3, but hidden lists 2 widths"):
        HourglassConfig(hidden=[3, 4], depth=3).build(8)
    for wrong in (0, [], [3, 0]):
        with pytest.raises(ValidationError, match="hidden"):
            HourglassConfig(hidden=wrong)


def test_lift_is_saved_but_not_trained() -> None:
    torch.manual_seed(0)
    stack, x = drawn(HourglassConfig(hidden=4, depth=2, lift=24).build(8)), random(2, 50, 8)
    assert "lift" not in dict(stack.named_parameters()) and not stack.lift.requires_grad
    before = stack.lift.clone()
    optimizer = torch.optim.AdamW(stack.parameters(), lr=0.1)
    stack(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(stack.lift, before)
    assert sum(p.numel() for p in stack.parameters()) == 2 * (3 * 24 * 4 + 24) + 24 * 8 == stack.active_parameters()
    assert stack.flops_per_token(0.0) == 2 * (2 * 3 * 24 * 4 + 24 * 8 + 8 * 24)
    other = HourglassConfig(hidden=4, depth=2, lift=24).build(8)  # another seed, another lift
    assert not torch.equal(other.lift, before)
    other.load_state_dict(stack.state_dict())
    torch.testing.assert_close(other(x), stack(x), rtol=0, atol=0)
    torch.testing.assert_close((x @ before.T).square().mean(), x.square().mean(), rtol=0.2, atol=0)


def test_lifted_stack_by_hand() -> None:
    stack, x = drawn(HourglassConfig(hidden=4, depth=1, lift=24).build(8)), random(2, 5, 8)
    lifted = x @ stack.lift.T
    update = stack.stack[0](stack.norms[0](lifted))
    torch.testing.assert_close(stack(x), x + update @ stack.project.weight.T)


def test_kat_starts_preserve_variance_and_approximate_their_activations() -> None:
    x = torch.linspace(-6, 6, 1201)[:, None]
    for start, function, error in (
        ("identity", lambda h: h, 1e-7),
        ("silu", torch.nn.functional.silu, 2.2e-4),
        ("gelu", torch.nn.functional.gelu, 4e-3),
    ):
        ffn = drawn(KATConfig(hidden=1024, groups=4, start=start).build(512))
        assert (ffn.second(x.expand(-1, 4)) - function(x)).abs().max() < error
        assert torch.equal(ffn.first(x.expand(-1, 4)), x.expand(-1, 4))
        tokens_in = random(400, 512)
        assert ffn.up(ffn.first(tokens_in)).std().item() == pytest.approx(1.0, rel=0.02)
        assert ffn(tokens_in).std().item() == pytest.approx(1.0, rel=0.05)


def test_kat_coefficients_are_vectors_of_the_right_size() -> None:
    shared, own = (KATConfig(hidden=16, groups=4, shared_numerator=s).build(8) for s in (True, False))
    assert [p.shape for p in shared.second.parameters()] == [(6,), (16,)]  # vectors: no weight decay
    assert [p.shape for p in own.second.parameters()] == [(24,), (16,)]


@pytest.mark.parametrize(
    ("width", "hidden", "message"), [(12, 16, "the model's width=12"), (16, 20, "groups=8 does not divide hidden=20")]
)
def test_kat_groups_must_divide(width: int, hidden: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KAT(width, KATConfig(hidden=hidden))


def test_parallel_ffns_are_the_sum_of_their_parts_and_one_wide_swiglu() -> None:
    ffn: ParallelFFN = drawn(ParallelFFNConfig(hidden=5, parts=3).build(8)).double()
    nn.init.normal_(ffn.scale)
    x = random(2, 6, 8, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for i in range(3):
        scaled = x * ffn.scale[8 * i : 8 * i + 8]
        gate = scaled @ ffn.gate_up.weight[5 * i : 5 * i + 5].T
        up = scaled @ ffn.gate_up.weight[15 + 5 * i : 20 + 5 * i].T
        expected += (torch.nn.functional.silu(gate) * up) @ ffn.down.weight[:, 5 * i : 5 * i + 5].T
    torch.testing.assert_close(ffn(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ffn.fused()(x), expected, rtol=1e-12, atol=1e-12)


def test_fusing_pre_norm_layers_is_exact() -> None:
    norms, parts = [], []
    for index, hidden in enumerate((5, 3, 7)):
        norm = RMSNorm(8).double()
        nn.init.normal_(norm.weight)
        norms.append(norm)
        parts.append(drawn(SwiGLU(8, hidden), seed=index).double())
    fused = fuse([(norm.weight, part) for norm, part in zip(norms, parts)])
    x = random(2, 6, 8, dtype=torch.float64)
    expected = sum(part(norm(x)) for norm, part in zip(norms, parts))
    torch.testing.assert_close(fused(RMSNorm(8).double()(x)), expected, rtol=1e-12, atol=1e-12)
    assert fused.down.in_features == 15


def test_fuse_refuses_parts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="at least one"):
        fuse([])
    with pytest.raises(ValueError, match=r"part 1: scale \(4,\) and a SwiGLU of width 8"):
        fuse([(torch.ones(8), SwiGLU(8, 3)), (torch.ones(4), SwiGLU(8, 3))])


def test_lifted_hourglass_in_a_decoder_scales_what_it_writes() -> None:
    model: Decoder = decoder(ffns=FFNS, layers=["attention + lifted x2"])
    stacks = [block.ffn for block in model.blocks]
    assert all(isinstance(stack, Hourglass) for stack in stacks)
    assert stacks[0].project.weight.std().item() == pytest.approx(0.2 / 4**0.5, rel=0.1)
    assert stacks[0].stack[0].down.weight.std().item() == pytest.approx(0.2, rel=0.1)
