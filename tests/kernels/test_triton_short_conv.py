from __future__ import annotations

from tests.kernels.interpreter import run_interpreted


def test_short_convolution_under_the_interpreter():
    run_interpreted(__file__, "triton_short_conv_interpreted.py")
