"""What a streamed source is to the order of tokens: sequences without end, of which nothing is known beforehand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pretrain.data.packing import Row


class Unmeasured:
    """An Arrangement of which only the sequences' numbers are known: see streaming_lane for what they hold."""

    windows_per_epoch: float = math.inf
    padding = 0.0
    of_documents = True

    def row(self, sequence: int) -> Row:
        raise AssertionError("a streamed source is read by lanes")

    def pieces(self, sequences: np.ndarray) -> Any:
        raise AssertionError("a streamed source is read by lanes")
