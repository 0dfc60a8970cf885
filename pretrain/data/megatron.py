"""The one place that imports megatron-core's indexed dataset: late, because it takes seconds, and quietly."""

from __future__ import annotations

import warnings
from types import ModuleType


def indexed_dataset() -> ModuleType:
    """`megatron.core.datasets.indexed_dataset`, without the warnings about optional CUDA packages that data does not
    use.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset as module
    return module
