"""What an operator returns is nobody's view: it may be changed in place, and engines may hang hooks on it.

A view that was made inside an autograd function raises when it is changed in place afterwards.
"""

import pytest
import torch

import kernels
from tests.kernels.row_cases import draw

B, T, H, K = 2, 5, 2, 4


def leaf(*shape, seed=0):
    return draw(*shape, dtype=torch.float32, seed=seed).requires_grad_()


def angles():
    return torch.zeros(B, T, 1, K // 2) + 0.3


OPERATORS = {
    "rms_norm": lambda: kernels.rms_norm(leaf(B, T, K), leaf(K)),
    "l2_norm": lambda: kernels.l2_norm(leaf(B, T, K)),
    "gated_rms_norm": lambda: kernels.gated_rms_norm(leaf(B, T, K), leaf(B, T, K, seed=1), leaf(K)),
    "add_rms_norm": lambda: kernels.add_rms_norm(leaf(B, T, K), leaf(B, T, K, seed=1), leaf(K)),
    "swiglu": lambda: kernels.swiglu(leaf(B, T, 2 * K)),
    "rotary": lambda: kernels.rotary(leaf(B, T, H, K), angles().cos(), angles().sin()),
    "rotary, interleaved": lambda: kernels.rotary(leaf(B, T, H, K), angles().cos(), angles().sin(), interleaved=True),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_outputs_may_be_changed_in_place(name):
    made = OPERATORS[name]()
    made = (made,) if torch.is_tensor(made) else made
    for y in made:
        assert y.requires_grad and y._base is None and y.is_contiguous()
    made[0].add_(1.0).sum().backward()  # of add_rms_norm the second, the sum, is what its backward is computed from
