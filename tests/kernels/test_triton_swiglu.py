from __future__ import annotations

from tests.kernels.interpreter import run_interpreted


def test_swiglu_under_the_interpreter():
    run_interpreted(__file__, "triton_swiglu_interpreted.py")
