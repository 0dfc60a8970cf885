"""Gated linear attention against flash-linear-attention's plain torch forms and transformers' Mamba-2."""

import pytest
import torch

from kernels.gated_linear_attention import gated_linear_attention, members


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def inputs(B=2, T=130, H=2, K=16, V=24):
    return draw(B, T, H, K), draw(B, T, H, K, seed=1), draw(B, T, H, V, seed=2)


def same(ours, theirs, leaves, tolerance=1e-5):
    """Outputs (and states, where both give one) and the gradients that a random direction in all of them sends back."""
    pairs = [(a, b) for a, b in zip(ours, theirs) if a is not None and b is not None]
    directions = [torch.randn(a.shape, generator=torch.Generator().manual_seed(9)) for a, _ in pairs]
    both = [
        torch.autograd.grad(sum((t * d).sum() for t, d in zip(side, directions)), leaves, retain_graph=True)
        for side in zip(*pairs)
    ]
    for a, b in [*pairs, *zip(*both)]:
        a, b = a.detach(), b.detach()
        assert float((a - b).norm() / b.norm()) < tolerance


def test_gla():
    naive = pytest.importorskip("fla.ops.gla.naive")
    q, k, v = inputs()
    z, state = draw(2, 130, 2, 16, seed=3), draw(2, 2, 16, 24, seed=4)
    g = members.gla_gate(z)
    ours = gated_linear_attention(q, k, v, g, initial_state=state, output_final_state=True)
    theirs = naive.naive_recurrent_gla(q, k, v, g, initial_state=state, output_final_state=True)
    same(ours, theirs, [q, k, v, z, state])


@pytest.mark.parametrize("form", ["naive_chunk_simple_gla", "naive_recurrent_simple_gla"])
def test_simple_gla(form):
    naive = pytest.importorskip("fla.ops.simple_gla.naive")
    q, k, v = inputs()
    z, state = draw(2, 130, 2, seed=3), draw(2, 2, 16, 24, seed=4)
    g = torch.nn.functional.logsigmoid(z)
    ours = gated_linear_attention(q, k, v, g, initial_state=state, output_final_state=True)
    theirs = getattr(naive, form)(q, k, v, g, initial_state=state, output_final_state=True)
    same(ours, theirs, [q, k, v, z, state])


def test_linear_attention():
    naive = pytest.importorskip("fla.ops.linear_attn.naive")
    q, k, v = inputs(T=128)
    same(gated_linear_attention(q, k, v), (naive.naive_chunk_linear_attn(q, k, v),), [q, k, v])
    ours = gated_linear_attention(q, k, v, scale=0.3, output_final_state=True)
    theirs = naive.naive_recurrent_linear_attn(q, k, v, scale=0.3, output_final_state=True)
    same(ours, theirs, [q, k, v])


def test_retention():
    naive = pytest.importorskip("fla.ops.retention.naive")
    q, k, v = inputs()
    g = members.retention_gate(2).expand(2, 130, 2)
    theirs = naive.naive_retention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    same(gated_linear_attention(q, k, v, g), (theirs,), [q, k, v])


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2(groups):
    """With step sizes up to 3 and rates up to 16: most chunks decay too far for the factored form, which is what is wanted."""
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    b, T, H, P, N = 2, 130, 4, 8, 16
    x, B, C = draw(b, T, H, P), draw(b, T, groups, N, seed=1), draw(b, T, groups, N, seed=2)
    dt, dt_bias, skip = draw(b, T, H, seed=3), draw(H, seed=4), draw(H, seed=5)
    A_log = torch.linspace(0.0, 2.77, H).requires_grad_()
    state = draw(b, H, P, N, seed=6)
    A = -A_log.exp()
    theirs = mamba2.mamba2_chunk_scan(
        x, dt, A, B, C, chunk_size=32, D=skip, dt_bias=dt_bias, dt_softplus=True, initial_states=state, return_final_states=True
    )  # fmt: skip
    d = members.ssd(x, members.mamba2_step_size(dt, dt_bias), A, B, C)
    y, final = gated_linear_attention(
        *d[:4], scale=d.scale, initial_state=state.transpose(2, 3), output_final_state=True
    )
    assert final is not None
    ours = (y + skip[:, None] * x, final.transpose(2, 3))
    same(ours, theirs, [x, dt, dt_bias, A_log, B, C, skip, state])


def test_gates():
    torch.manual_seed(0)
    gdn = pytest.importorskip("fla.ops.gated_delta_rule.gate")
    kda = pytest.importorskip("fla.ops.kda.gate")
    a, A_log, bias = torch.randn(2, 5, 4), torch.randn(4), torch.randn(4)
    torch.testing.assert_close(members.gdn_gate(a, A_log, bias), gdn.naive_gdn_gate(a, A_log, bias))
    a, bias = torch.randn(2, 5, 4, 8), torch.randn(32)
    torch.testing.assert_close(members.kda_gate(a, A_log, bias), kda.naive_kda_gate(a, A_log, bias))
    safe = kda.naive_kda_lowerbound_gate(a, A_log, bias, lower_bound=-5.0)
    torch.testing.assert_close(members.kda_safe_gate(a, A_log, bias), safe)
