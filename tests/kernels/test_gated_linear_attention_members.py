"""Each member's parameters against its published formula, written out."""

import math

import pytest
import torch

from kernels.gated_linear_attention import gated_linear_attention, members
from kernels.state_space.reference import selective_scan_reference


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_retention():
    gamma = members.retention_gate(4).double().exp()
    close(gamma, torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256], dtype=torch.float64), 1e-7)


def test_gla():
    z = draw(2, 3, 4, 5)
    close(members.gla_gate(z).exp(), torch.sigmoid(z) ** (1 / 16))
    assert members.gla_gate(z.bfloat16()).dtype == torch.float32
    close(members.gla_gate(torch.zeros(1)), torch.full((1,), -math.log(2) / 16), 1e-7)


@pytest.mark.parametrize("bound", [0.0, 0.3])
def test_hgrn2(bound):
    f = draw(2, 3, 4, 5)
    g, k = members.hgrn2_gate_and_key(f, bound)
    alpha = bound + (1 - bound) * torch.sigmoid(f)
    close(g.exp(), alpha, 1e-7)
    close(k, 1 - alpha, 1e-7)
    tensor = torch.full((4, 5), bound, dtype=torch.float64, requires_grad=True)
    g, k = members.hgrn2_gate_and_key(f, tensor)
    close(g.exp(), alpha)
    (gradient,) = torch.autograd.grad(g.sum() + k.sum(), tensor)
    assert bool(gradient.isfinite().all())


def test_hgrn2_keeps_decays_near_one():
    """At f = 20 the forgetting 1 - α is 2e-9: lost if α itself were formed in fp32."""
    g, k = members.hgrn2_gate_and_key(torch.tensor([20.0]))
    close(k, torch.tensor([math.exp(-20.0)]), 1e-12)
    close(g, torch.tensor([-math.exp(-20.0)]), 1e-12)


def test_ssd_is_the_state_space_model():
    """Against the Mamba-1 recurrence with one decay and one step size a head."""
    b, T, H, P, G, N = 2, 20, 4, 3, 2, 5
    x, B, C = draw(b, T, H, P), draw(b, T, G, N, seed=1), draw(b, T, G, N, seed=2)
    dt = members.mamba2_step_size(draw(b, T, H, seed=3), draw(H, seed=4), (0.01, 2.0))
    assert float(dt.min()) >= 0.01 and float(dt.max()) <= 2.0
    A = -torch.exp(draw(H, seed=5))
    d = members.ssd(x, dt, A, B, C)
    y, state = gated_linear_attention(*d[:4], scale=d.scale, output_final_state=True)
    assert state is not None
    for h in range(H):
        group = h // (H // G)
        y_head, state_head = selective_scan_reference(
            x[:, :, h],
            dt[:, :, h, None].expand(b, T, P),
            A[h].expand(P, N),
            B[:, :, group],
            C[:, :, group],
            output_final_state=True,
        )
        assert state_head is not None
        close(y[:, :, h], y_head)
        close(state[:, h], state_head.transpose(1, 2))


def test_delta_gates():
    a, A_log = draw(2, 3, 4), draw(4, seed=1)
    close(members.gdn_gate(a, A_log, A_log + 1), -A_log.exp() * torch.log1p(torch.exp(a + A_log + 1)))
    a, bias = draw(2, 3, 4, 5), draw(20, seed=2)
    rates, shifted = A_log.exp().view(4, 1), a + bias.view(4, 5)
    close(members.kda_gate(a, A_log, bias), -rates * torch.log1p(torch.exp(shifted)))
    safe = members.kda_safe_gate(a, A_log, bias, -5.0)
    close(safe, -5.0 / (1 + torch.exp(-rates * shifted)))
    assert float(safe.min()) > -5.0 and float(safe.max()) < 0.0


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="lower_bound"):
        members.hgrn2_gate_and_key(torch.zeros(1), 1.0)
    with pytest.raises(ValueError, match="lower_bound"):
        members.kda_safe_gate(torch.zeros(1, 1, 1, 1), torch.zeros(1), torch.zeros(1), 5.0)
