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

# Every kind of FFN, for tests that choose layers of their own: decoder(ffns=FFNS, layers=[...]).
FFNS: dict[str, Any] = {
    **MODEL["ffns"],
    "geglu": {"kind": "geglu", "hidden": 24},
    "bilinear": {"kind": "bilinear", "hidden": 24},
    "mlp": {"kind": "mlp", "hidden": 24, "activation": "relu2"},
    "fused": {"kind": "fused", "hidden": 12, "parts": 3},
    "kat": {"kind": "kat", "hidden": 48, "groups": 4},
    "lifted": {"kind": "hourglass", "hidden": [6, 10], "lift": 48},
    "qwen": {
        "kind": "moe",
        "experts": 6,
        "top_k": 3,
        "hidden": 16,
        "gate": "softmax",
        "bias_rate": 0.0,
        "shared_hidden": 16,
        "shared_gate": True,
        "batch_loss": 0.01,
        "z_loss": 0.001,
    },
    "grouped": {
        "kind": "moe",
        "experts": 8,
        "top_k": 2,
        "hidden": 16,
        "groups": 4,
        "top_groups": 2,
        "route_scale": 2.5,
        "sequence_loss": 0.01,
    },
    "zaya": {"kind": "zaya_moe", "experts": 4, "hidden": 16, "router_width": 12},
    "zaya_skip": {"kind": "zaya_moe", "experts": 4, "top_k": 2, "hidden": 16, "router_width": 12, "skip": "identity"},
}


def decoder(seed: int = 0, **changes: Any) -> Decoder:
    """The tiny model with seeded weights, large enough that every sublayer shows in the logits."""
    torch.manual_seed(seed)
    return Decoder(DecoderConfig.model_validate({**MODEL, "init_std": 0.2, **changes}))


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, MODEL["vocabulary"], shape, generator=torch.Generator().manual_seed(seed))
