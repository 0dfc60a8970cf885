from __future__ import annotations

from tests.kernels.interpreter import run_interpreted


def test_gated_linear_attention_under_the_interpreter():
    run_interpreted(__file__, "triton_gated_linear_attention_interpreted.py")
