from __future__ import annotations

from tests.kernels.interpreter import run_interpreted


def test_rotary_under_the_interpreter():
    run_interpreted(__file__, "triton_rotary_interpreted.py")
