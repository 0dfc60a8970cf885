from __future__ import annotations

import pytest

from tests.kernels.interpreter import run_interpreted


@pytest.mark.parametrize("campaign", [False, pytest.param(True, marks=pytest.mark.campaign)])
def test_delta_rule_under_the_interpreter(campaign):
    run_interpreted(__file__, "triton_delta_rule_interpreted.py", campaign=campaign)
