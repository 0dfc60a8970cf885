"""Text to tokens to batches.

`python -m pretrain.data prepare` turns text into a tokenizer and a Megatron `.bin`/`.idx` corpus; `Corpus` opens one,
`Loader` and `ValidationSet` read packed batches from it. Names are resolved on first use, because torch,
megatron-core and datasets take seconds to import and `--help` should not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.data.batch import Batch
    from pretrain.data.config import DataConfig
    from pretrain.data.errors import DataError
    from pretrain.data.loader import Loader
    from pretrain.data.order import Order
    from pretrain.data.prepare import PrepareOptions
    from pretrain.data.store import Corpus
    from pretrain.data.tokenizer import Tokenizer
    from pretrain.data.validation import ValidationSet

__all__ = [
    "Batch",
    "Corpus",
    "DataConfig",
    "DataError",
    "Loader",
    "Order",
    "PrepareOptions",
    "Tokenizer",
    "ValidationSet",
]

_HOME = {
    "Batch": "batch",
    "Corpus": "store",
    "DataConfig": "config",
    "DataError": "errors",
    "Loader": "loader",
    "Order": "order",
    "PrepareOptions": "prepare",
    "Tokenizer": "tokenizer",
    "ValidationSet": "validation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
