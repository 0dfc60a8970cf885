from __future__ import annotations

import pytest

from tests.kernels.interpreter import run_interpreted


@pytest.mark.parametrize("part", ["none or head", "channel", "segments", "descriptors or extreme or tables"])
def test_delta_rule_under_the_interpreter(part):
    run_interpreted(__file__, "triton_delta_rule_interpreted.py", select=part)
