from __future__ import annotations

from tests.kernels.interpreter import run_interpreted


def test_experts_under_the_interpreter():
    run_interpreted(__file__, "triton_experts_interpreted.py")


def test_routing_under_the_interpreter():
    run_interpreted(__file__, "triton_routing_interpreted.py")
