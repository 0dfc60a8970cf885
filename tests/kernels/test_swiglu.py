"""SwiGLU: the fast form against the definition and torch's own, gradients, slices, blocks of rows, refusals."""

import pytest
import torch
import torch.nn.functional as F

from kernels.common import rows
from kernels.dispatch import Request, explain
from kernels.swiglu import FORMS, chunked, reference, swiglu
from tests.kernels.row_cases import assert_same, blocks, draw, value_and_gradient

block = blocks(rows, "BLOCK_BYTES", 64)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("shape", [(7, 10), (2, 3, 5, 8), (9, 2), (6,), (0, 4)])
def test_fast_form_is_the_definition(shape, dtype, tolerance, block):
    x = draw(*shape, dtype=dtype)
    ours, theirs = (value_and_gradient(f, x) for f in (chunked.swiglu_chunked, reference.swiglu_reference))
    assert ours[0].dtype == dtype
    assert_same(ours, theirs, tolerance)


def test_against_torch_and_by_hand(block):
    x = draw(5, 12)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(x), F.silu(gate) * up, atol=1e-14, rtol=1e-14)
    # silu(0) = 0 with slope 1/2; silu(1) = 1 / (1 + 1/e)
    y, d = value_and_gradient(lambda t: swiglu(t) * 1.0, torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
    torch.testing.assert_close(y, torch.tensor([[0.0, 3 * 0.7310586]]))
    upstream = draw(1, 2, dtype=torch.float32, seed=1)
    torch.testing.assert_close(d[0, 0], upstream[0, 0] * 0.5 * 2.0)
    torch.testing.assert_close(d[0, 2:], upstream[0] * torch.tensor([0.0, 0.7310586]))


def test_gradcheck(block):
    assert torch.autograd.gradcheck(swiglu, draw(4, 6).requires_grad_())


def test_slices_of_a_wider_projection_keep_their_memory():
    wide = draw(6, 20)
    x = wide[:, 4:16].requires_grad_()
    y = swiglu(x)
    (saved,) = y.grad_fn.saved_tensors
    assert saved.data_ptr() == x.data_ptr()  # nothing else is kept, and nothing was copied
    ours, exact = value_and_gradient(swiglu, wide[:, 4:16]), value_and_gradient(swiglu, wide[:, 4:16].contiguous())
    for a, b in zip(ours, exact, strict=True):
        assert torch.equal(a, b)


def test_bf16_errs_by_its_roundings():
    x = draw(64, 96, dtype=torch.bfloat16)
    ours = value_and_gradient(swiglu, x)
    exact = value_and_gradient(reference.swiglu_reference, x.double())
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() / b.norm() < 4e-3


def test_large_gates_stay_finite():
    y, d = value_and_gradient(swiglu, torch.tensor([[-1e4, 1e4, 2.0, 2.0]]))
    assert y.tolist() == [[0.0, 2e4]]
    assert d.isfinite().all()


def test_autocast_changes_nothing_and_forms_are_ordered():
    x = draw(3, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(swiglu(x), swiglu(x.clone()))
        assert swiglu(x).dtype == torch.float32
    request = Request("swiglu", torch.device("cuda"), torch.float32, {"rows": 3, "H": 4})
    assert explain(FORMS, request)[0] == ("triton", "chosen")


@pytest.mark.parametrize("x", [torch.zeros(3, 5), torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 0)])
def test_refusals_say_the_layout(x):
    with pytest.raises(ValueError, match="gate_up must be floating point"):
        swiglu(x)
