"""The selective scan against transformers' Mamba."""

import pytest
import torch

from kernels.state_space import selective_scan, selective_scan_step


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_mamba():
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    b, T, D, N = 2, 70, 6, 4
    x, B, C = draw(b, T, D), draw(b, T, N, seed=1), draw(b, T, N, seed=2)
    z, skip = draw(b, T, D, seed=3), draw(D, seed=4)
    A_log = torch.arange(1.0, N + 1).log().repeat(D, 1).requires_grad_()
    dt = torch.nn.functional.softplus(z)
    leaves = [x, z, A_log, B, C, skip]
    y, state = selective_scan(x, dt, -A_log.exp(), B, C, skip, output_final_state=True)
    theirs, their_state = mamba.mamba_selective_scan(
        x.transpose(1, 2), z.transpose(1, 2), -A_log.exp(), B.transpose(1, 2), C.transpose(1, 2), skip,
        delta_softplus=True, return_last_state=True,
    )  # fmt: skip
    theirs = theirs.transpose(1, 2)
    assert state is not None
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    ours = [y, state, *torch.autograd.grad(y, leaves, dy, retain_graph=True)]
    for a, b in zip(ours, [theirs, their_state, *torch.autograd.grad(theirs, leaves, dy)], strict=True):
        a, b = a.detach(), b.detach()
        assert float((a - b).norm() / b.norm()) < 1e-5


def test_mamba_step():
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    b, D, N = 2, 6, 4
    x, dt = draw(b, D).detach(), torch.rand(b, D, generator=torch.Generator().manual_seed(1))
    A, B, C = -torch.rand(D, N), draw(b, N, seed=2).detach(), draw(b, N, seed=3).detach()
    skip, state = draw(D, seed=4).detach(), draw(b, D, N, seed=5).detach()
    theirs_state = state.clone()
    theirs = mamba.mamba_selective_state_update(theirs_state, x, dt, A, B, C, skip)
    y, after = selective_scan_step(x, dt, A, B, C, skip, state)
    torch.testing.assert_close(y, theirs)
    torch.testing.assert_close(after, theirs_state)
