from __future__ import annotations

from tests.kernels.interpreter import run_interpreted


def test_the_order_of_programs_under_the_interpreter():
    run_interpreted(__file__, "triton_tiles_interpreted.py")
