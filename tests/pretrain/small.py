"""A tiny model with every kind of sublayer, for tests."""

from __future__ import annotations

from typing import Any

import torch

from pretrain.model.decoder import Decoder, DecoderConfig

MODEL: dict[str, Any] = {
    "vocabulary": 64,
    "width": 32,
    "mixers": {
        "gdn": {"kind": "gated_delta_net", "heads": 2, "value_heads": 4, "head_dim": 8, "value_dim": 12},
        "attention": {"kind": "attention", "heads": 4, "kv_heads": 2, "rope_fraction": 0.5},
        "window": {"kind": "attention", "heads": 2, "head_dim": 8, "window": 5},
    },
    "ffns": {
        "swiglu": {"kind": "swiglu", "hidden": 48},
        "hourglass": {"kind": "hourglass", "hidden": 12, "depth": 2},
        "moe": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 16, "shared_hidden": 16},
    },
    "layers": ["gdn + moe x2", "attention + hourglass", "window + swiglu"],
}


def decoder(seed: int = 0, **changes: Any) -> Decoder:
    """The tiny model with seeded weights, large enough that every sublayer shows in the logits."""
    torch.manual_seed(seed)
    return Decoder(DecoderConfig.model_validate({**MODEL, "init_std": 0.2, **changes}))


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, MODEL["vocabulary"], shape, generator=torch.Generator().manual_seed(seed))
