"""The Triton rational activation against its definition in float64, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from kernels.rational import rational, triton
from kernels.rational.reference import rational_reference
from kernels.rational.triton import _block, rational_triton
from kernels.tuning import override

# A few bytes a tile and one program a column tile and wave: every program passes over several row tiles.
SMALL = {"rational_forward": {"BYTES": 128}, "rational_backward": {"BYTES": 128, "WAVES": 1}}


def leaves(shape, groups=(1, 2), orders=(5, 4), dtype=torch.float32):
    torch.manual_seed(0)
    x, numerator, denominator = (
        torch.randn(shape),
        torch.randn(groups[0], orders[0] + 1),
        torch.randn(groups[1], orders[1]),
    )
    return x.to(dtype), numerator, denominator


def values_and_gradients(function, inputs):
    inputs = [t.clone().requires_grad_() for t in inputs]
    y = function(*inputs)
    torch.manual_seed(1)
    dy = torch.randn(y.shape)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def assert_near(inputs, tolerance=1e-5, function=rational_triton):
    """Relative to each tensor's norm. 1e-5 is what fp32 allows: sums of x^5 cancel, and the definition itself errs by 8e-6."""
    ours = values_and_gradients(function, inputs)
    exact = values_and_gradients(rational_reference, [t.double() for t in inputs])
    for a, b, given in zip(ours, exact, (inputs[0], *inputs), strict=True):
        assert a.dtype == given.dtype and a.shape == b.shape
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.fixture(params=[None, SMALL], ids=["usual tiles", "many tiles"])
def tiles(request):
    with override(request.param or {}):
        yield


@pytest.mark.parametrize("groups", [(1, 1), (1, 4), (4, 1), (4, 4)])
@pytest.mark.parametrize("shape", [(2, 3, 3, 12), (33, 4)])
def test_values_and_gradients(shape, groups, tiles):
    assert_near(leaves(shape, groups))


@pytest.mark.parametrize("orders", [(0, 1), (3, 2), (6, 7)])
def test_orders(orders):
    assert_near(leaves((19, 21), (3, 3), orders))


def test_groups_of_several_column_tiles():
    """Channels that the last tile of a group does not have are the next group's, and stay so."""
    for width in (48, 40, 33):
        assert width > _block(width) == 16
        assert_near(leaves((5, 3 * width), (3, 3)))


def test_half_precision_is_widened():
    x, numerator, denominator = leaves((40, 16), (1, 4), dtype=torch.float16)
    ours = values_and_gradients(rational_triton, (x, numerator, denominator))
    exact = values_and_gradients(rational_reference, (x.double(), numerator.double(), denominator.double()))
    assert [t.dtype for t in ours] == [torch.float16, torch.float16, torch.float32, torch.float32]
    for a, b in zip(ours, exact, strict=True):
        assert (a.double() - b).norm() / b.norm() < 1e-3


def test_large_inputs():
    """x^5 is 1e35 at the end of what fits: the denominator is never squared, and everything stays finite and exact."""
    x = torch.tensor([[-1e7, -1e3, 1e3, 1e7], [-1.0, 0.0, 1e6, 2.0]])
    _, numerator, denominator = leaves((1, 4), (1, 2))
    assert_near((x, numerator, denominator))


def test_sums_are_taken_in_fp32():
    """4096 ones a channel: a sum in fp16 would stop at 2048."""
    x = torch.ones(4096, 2, dtype=torch.float16)
    numerator, denominator = torch.zeros(1, 3, requires_grad=True), torch.zeros(2, 1)
    (gradient,) = torch.autograd.grad(rational_triton(x, numerator, denominator).sum(), numerator)
    assert torch.equal(gradient, torch.full((1, 3), 8192.0))


def test_a_denominator_of_zeros_gets_a_gradient():
    x, numerator = torch.tensor([[0.5, -2.0]]), torch.tensor([[0.0, 1.0]])
    denominator = torch.zeros(1, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(rational_triton(x, numerator, denominator).sum(), denominator)
    assert gradient.tolist() == [[-4.25, 7.875]]  # -x * x and -x * x^2, summed


def test_the_same_bits_every_time():
    inputs = leaves((70, 24), (1, 3))
    first, second = (values_and_gradients(rational_triton, inputs) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_one_set_of_partial_sums_a_program(monkeypatch):
    """What is stored for the coefficients grows with the programs, not with the elements."""
    made = []
    empty = torch.empty
    monkeypatch.setattr(triton.torch, "empty", lambda *shape, **how: made.append(shape) or empty(*shape, **how))
    with override({"rational_backward": {"BYTES": 256, "WAVES": 1}}):
        values_and_gradients(rational_triton, leaves((64, 16), (1, 4)))
    assert (10, triton.UNITS_UNKNOWN // 4, 4, 1) in made


def test_slices_no_rows_and_gradients_that_are_views():
    wide, numerator, denominator = leaves((6, 48), (1, 4))
    assert_near((wide[:, 8:40], numerator, denominator))
    assert_near((wide[:, ::3], numerator, denominator))
    x = torch.zeros(0, 8, requires_grad=True)
    coefficients = numerator.clone().requires_grad_()
    rational_triton(x, coefficients, denominator).sum().backward()
    assert x.grad.shape == (0, 8) and coefficients.grad.tolist() == [[0.0] * 6]
    x = wide.clone().requires_grad_()
    y = rational_triton(x, numerator, denominator)
    torch.testing.assert_close(
        *(
            torch.autograd.grad(y, x, dy, retain_graph=True)[0]
            for dy in (torch.ones(()).expand(6, 48), torch.ones(6, 48))
        )
    )


def test_one_row():
    assert_near(leaves((12,), (1, 4)))


def test_coefficients_that_are_not_contiguous():
    x, numerator, denominator = leaves((9, 12), (3, 3))
    assert_near((x, numerator.T.contiguous().T, denominator.T.contiguous().T))


def test_it_is_chosen():
    assert_near(leaves((3, 8), (1, 2)), function=rational)


def test_tiles_waste_few_lanes():
    widths = {1: 1, 3: 4, 8: 8, 16: 16, 96: 32, 100: 16, 128: 128, 131: 16, 192: 64, 384: 128, 509: 128}
    assert {group: _block(group) for group in widths} == widths
