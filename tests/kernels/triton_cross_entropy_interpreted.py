"""The Triton form of the head's loss against the reference in float64, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from kernels import tuning
from kernels.cross_entropy import reference
from kernels.cross_entropy import triton as form
from kernels.cross_entropy.logits import Shard, Terms
from kernels.cross_entropy.triton import linear_cross_entropy, token_losses


def relative(a, b):
    return ((a.double() - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-30)).item()


@pytest.fixture(params=[None, 16], ids=["one slice", "many slices"])
def block(request, monkeypatch):
    if request.param:
        small = {**form.DEFAULTS["cross_entropy"]["generic"], "BLOCK": request.param}
        monkeypatch.setitem(form.DEFAULTS["cross_entropy"], "generic", small)
    tuning.forget()
    yield
    tuning.forget()


def operands(N, D, V, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(N, D), torch.randn(V, D)
    targets = torch.randint(0, V, (N,))
    targets[::4] = -100
    return [x, weight, *([torch.randn(V)] if bias else [])], targets


CASES = [(0.0, 0.0, False, "sum"), (0.1, 0.2, True, "mean"), (0.1, 0.2, True, "none")]


@pytest.mark.parametrize("z_loss, smooth, bias, reduction", CASES)
def test_values_and_gradients(z_loss, smooth, bias, reduction, block):
    for N, D, V, chunk in ((5, 3, 70, 2), (2, 3, 1, None)):
        tensors, targets = operands(N, D, V, bias)
        options = {"ignore_index": -100, "z_loss": z_loss, "label_smoothing": smooth, "reduction": reduction}
        results = []
        for function, dtype in ((linear_cross_entropy, torch.float32), (reference.linear_cross_entropy, torch.float64)):
            leaves = [t.to(dtype).requires_grad_() for t in tensors]
            loss = function(*leaves[:2], targets, bias=leaves[2] if bias else None, chunk=chunk, **options)
            torch.manual_seed(1)
            upstream = torch.randn(loss.shape, dtype=torch.float64).to(dtype)
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves, upstream)])
        for i, (a, b) in enumerate(zip(*results, strict=True)):
            torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-5, msg=lambda text, i=i: f"{i}: {text}")


def test_half_precision_and_large_logits():
    torch.manual_seed(0)
    logits = (torch.randn(6, 300) * 100).half()
    targets, factor = torch.randint(0, 300, (6,)), torch.rand(6)
    exact = logits.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad(wanted, exact, factor.double())
    work = logits.clone()
    losses = token_losses(work, None, targets, factor, Terms(), True)
    assert relative(losses, wanted.detach()) < 1e-6
    assert relative(work, gradient) < 1e-3


def test_without_gradients_the_losses_are_the_same():
    torch.manual_seed(0)
    logits, targets, factor = torch.randn(4, 50), torch.randint(0, 50, (4,)), torch.ones(4)
    before = logits.clone()
    losses = token_losses(logits, None, targets, factor, Terms(0.1, 0.1), False)
    assert torch.equal(logits, before)
    assert torch.equal(losses, token_losses(logits, None, targets, factor, Terms(0.1, 0.1), True))


def test_a_target_outside_the_vocabulary_is_not_passed_over():
    logits, factor = torch.zeros(3, 8), torch.ones(3)
    losses = token_losses(logits, None, torch.tensor([7, 8, -1]), factor, Terms(), True)
    assert losses.isnan().tolist() == [False, True, True]


def test_parts_of_a_vocabulary(block):
    """Two ranks' parts, each finished with the numbers of both."""
    torch.manual_seed(0)
    whole, targets, factor = torch.randn(5, 90), torch.tensor([0, 39, 40, 89, 7]), torch.rand(5)
    terms = Terms(0.1, 0.2)
    halves, gathered = [whole[:, :40].clone(), whole[:, 40:].clone()], []

    def keep(parts):
        gathered.append(parts.clone())
        return parts

    for half, first in zip(halves, (0, 40)):
        token_losses(half.clone(), None, targets, factor, terms, False, Shard(first, 90, keep))
    everything = torch.cat(gathered)
    losses = [
        token_losses(half, None, targets, factor, terms, True, Shard(first, 90, lambda parts: everything))
        for half, first in zip(halves, (0, 40))
    ]
    wanted = token_losses(whole, None, targets, factor, terms, True)
    for loss in losses:
        torch.testing.assert_close(loss, wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch.cat(halves, 1), whole, atol=1e-6, rtol=1e-5)
