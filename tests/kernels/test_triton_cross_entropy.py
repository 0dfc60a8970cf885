from __future__ import annotations

from tests.kernels.interpreter import run_interpreted


def test_cross_entropy_under_the_interpreter():
    run_interpreted(__file__, "triton_cross_entropy_interpreted.py")
