"""The rational activation: fast form against the definition, gradients, blocks of rows, extremes, errors."""

from __future__ import annotations

import pytest
import torch

from kernels.benching.memory import peak_bytes
from kernels.dispatch import Request, explain
from kernels.rational import FORMS, chunked, rational
from kernels.rational.chunked import rational_chunked
from kernels.rational.reference import rational_reference
from tests.kernels.interpreter import run_interpreted


def inputs(shape, groups=(1, 2), orders=(5, 4), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return draw(*shape), draw(groups[0], orders[0] + 1), draw(groups[1], orders[1])


def values_and_gradients(function, leaves):
    y = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def assert_same(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.fixture(params=[None, 40], ids=["one block", "many blocks"])
def block(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", request.param)


@pytest.mark.parametrize("groups", [(1, 1), (1, 4), (4, 1), (4, 4)])
@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 5, 8), (11, 4), (12,), (0, 8)])
def test_chunked_is_the_definition(shape, groups, block):
    leaves = inputs(shape, groups)
    ours = values_and_gradients(rational_chunked, leaves)
    assert_same(ours, values_and_gradients(rational_reference, leaves), 1e-11)


@pytest.mark.parametrize("orders", [(5, 4), (0, 1), (1, 3), (3, 2)])
def test_gradcheck(orders, block):
    assert torch.autograd.gradcheck(rational, inputs((3, 6), (1, 3), orders))


def test_by_hand():
    x = torch.tensor([[2.0, -1.0]])
    numerator = torch.tensor([[1.0, 0.0, 3.0], [0.0, 1.0, 0.0]])
    denominator = torch.tensor([[-1.0], [0.5]])
    # (1 + 3 * 4) / (1 + |-2|) and -1 / (1 + |-0.5|)
    torch.testing.assert_close(rational(x, numerator, denominator), torch.tensor([[13 / 3, -1 / 1.5]]))


def test_groups_are_neighbouring_channels():
    x, numerator, denominator = inputs((5, 12), (3, 3))
    parts = [rational(x[:, 4 * g : 4 * g + 4], numerator[g : g + 1], denominator[g : g + 1]) for g in range(3)]
    assert_same([rational(x, numerator, denominator)], [torch.cat(parts, dim=-1)], 1e-14)


def test_a_denominator_of_zeros_gets_a_gradient():
    x = torch.tensor([[0.5, -2.0]], dtype=torch.float64)
    numerator = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    denominator = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    for form in (rational_chunked, rational_reference):
        y = form(x, numerator, denominator)
        torch.testing.assert_close(y, x)
        (gradient,) = torch.autograd.grad(y.sum(), denominator)
        # -x * x and -x * x^2, summed
        torch.testing.assert_close(gradient, torch.tensor([[-4.25, 7.875]], dtype=torch.float64))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_is_near_the_exact_result(dtype, tolerance, block):
    x, numerator, denominator = inputs((300, 16), (1, 4), dtype=torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    ours = values_and_gradients(rational, (x, numerator, denominator))
    exact = values_and_gradients(
        rational_reference, [t.detach().double().requires_grad_() for t in (x, numerator, denominator)]
    )
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32, torch.float32]
    for a, b in zip(ours, exact):
        assert (a.double() - b).norm() / b.norm() < tolerance


def test_coefficient_gradients_of_bf16_inputs_are_summed_in_fp32():
    """4096 ones a channel: a bf16 sum would stop growing at 256."""
    x = torch.ones(4096, 2, dtype=torch.bfloat16)
    numerator = torch.zeros(1, 3, requires_grad=True)
    denominator = torch.zeros(2, 1)
    (gradient,) = torch.autograd.grad(rational(x, numerator, denominator).sum(), numerator)
    assert torch.equal(gradient, torch.full((1, 3), 8192.0))


def test_strides_and_autocast():
    x, numerator, denominator = inputs((6, 24), (1, 2), dtype=torch.float32)
    sliced = x[:, 8:16]
    assert_same(
        values_and_gradients(rational, (sliced, numerator, denominator)),
        values_and_gradients(rational, (sliced.contiguous(), numerator, denominator)),
        0,
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rational(x, numerator, denominator).dtype == torch.float32


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_either_zero_in_the_denominator_counts_as_rising(zero):
    """x (1 - x) is zero at one and at both zeros; its absolute value has no slope there, the definition takes +1."""
    x = torch.tensor([[1.0, zero]], dtype=torch.float64, requires_grad=True)
    numerator = torch.tensor([[1.0]], dtype=torch.float64)
    denominator = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    for form in (rational_chunked, rational_reference):
        (gradient,) = torch.autograd.grad(form(x, numerator, denominator).sum(), x)
        assert gradient.tolist() == [[1.0, -1.0]]  # -(1 - 2 x)


def test_large_inputs_stay_finite():
    """x^5 is 1e35 at the end of what fits: the denominator is never squared."""
    _, numerator, denominator = inputs((1, 4), (1, 2), dtype=torch.float32)
    x = torch.tensor([[-1e7, -1e3, 1e3, 1e7], [-1.0, 0.0, 1e6, 2.0]], requires_grad=True)
    exact = [t.detach().double().requires_grad_() for t in (x, numerator, denominator)]
    ours = values_and_gradients(rational, (x, numerator, denominator))
    for a, b in zip(ours, values_and_gradients(rational_reference, exact), strict=True):
        assert (a.double() - b).norm() / b.norm() < 1e-5


@pytest.mark.parametrize("dtype, blocks", [(torch.float32, (2, 5)), (torch.bfloat16, (3, 6))])
def test_temporaries_are_a_few_blocks_of_rows(dtype, blocks, monkeypatch):
    """Beyond the results: two blocks forward, five backward, one more where x is widened; and nothing but the inputs is kept."""
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", 4096 // torch.get_num_threads())
    x, numerator, denominator = inputs((512, 64), (1, 4), dtype=torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    y = rational_chunked(x, numerator, denominator)
    dy = torch.ones_like(y)
    kept = [t.data_ptr() for t in y.grad_fn.saved_tensors]
    assert kept == [t.data_ptr() for t in (x, numerator, denominator)]
    size, small = x.numel() * x.element_size(), 8192
    for count, call in zip(
        blocks,
        (
            lambda: rational_chunked(x.detach(), numerator, denominator),
            lambda: torch.autograd.grad(y, (x, numerator, denominator), dy, retain_graph=True),
        ),
        strict=True,
    ):
        call()
        assert size + count * 4 * 4096 <= peak_bytes(call, x.device) <= size + count * 4 * 4096 + small


def test_forms_are_ordered(monkeypatch):
    request = Request("rational", torch.device("cuda"), torch.bfloat16, {"rows": 3, "D": 4, "G": 2, "P": 5, "Q": 4})
    assert [form.name for form in FORMS] == ["triton", "chunked", "reference"]
    assert explain(FORMS, request)[0] == ("triton", "chosen")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert dict(explain(FORMS[1:], request))["reference"] == "chosen"


def test_the_triton_form_under_the_interpreter():
    run_interpreted(__file__, "triton_rational_interpreted.py")


@pytest.mark.parametrize("form", ["chunked", "reference"])
def test_every_form_can_be_forced(form, monkeypatch):
    monkeypatch.setenv("BRAID_KERNELS", form)
    leaves = inputs((3, 4))
    assert_same([rational(*leaves)], [rational_reference(*leaves)], 1e-12)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((torch.zeros(2, 4, dtype=torch.int64), torch.ones(1, 6), torch.ones(1, 4)), "x must be"),
        ((torch.zeros(2, 4), torch.ones(6), torch.ones(1, 4)), "numerator must be"),
        ((torch.zeros(2, 4), torch.ones(1, 6), torch.ones(2, 0)), "denominator must be"),
        ((torch.zeros(2, 4), torch.ones(2, 6), torch.ones(4, 4)), "numerator has 2 groups and denominator 4"),
        ((torch.zeros(2, 5), torch.ones(1, 6), torch.ones(2, 4)), "D = 5 channels, which 2 groups"),
    ],
)
def test_mistakes_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        rational(*arguments)
