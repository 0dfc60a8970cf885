from __future__ import annotations

import pytest
import torch

from kernels.cca.taps import combined, separated
from tests.kernels.cca_cases import Sizes, draw, parameters
from tests.kernels.interpreter import run_interpreted


def test_cca_under_the_interpreter() -> None:
    run_interpreted(__file__, "triton_cca_interpreted.py")


@pytest.mark.parametrize(
    "sizes", [Sizes(2, 1, 3, 2, 2), Sizes(2, 2, 4, 4, 3), Sizes(1, 1, 5, 1, 1), Sizes(1, 1, 2, 1, 3)]
)
def test_gradients_of_one_convolution_are_those_of_the_two(sizes: Sizes) -> None:
    leaves = [x.requires_grad_() for x in parameters(sizes, torch.float32)[:4]]
    taps, offset = combined(*leaves)
    dtaps, doffset = draw(*taps.shape, dtype=torch.float32), draw(*offset.shape, seed=1, dtype=torch.float32)
    # Autograd through the sums themselves.
    exact = torch.autograd.grad([taps, offset], leaves, [dtaps, doffset])
    ours = separated(dtaps, doffset, *(x.detach() for x in leaves[:3]))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
