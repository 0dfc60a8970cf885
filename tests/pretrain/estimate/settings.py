"""Configurations that the estimates are tested on, small enough for ranks on a CPU."""

from __future__ import annotations

from typing import Any

import torch

from pretrain.config import RunConfig
from pretrain.data.batch import Batch

MODELS: dict[str, dict[str, Any]] = {
    "attention moe": {
        "mixers": {"a": {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 16}},
        "ffns": {"e": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 64, "shared_hidden": 32}},
        "layers": ["a + e x3"],
    },
    "gated delta net": {
        "mixers": {
            "g": {"kind": "gated_delta_net", "heads": 2, "value_heads": 4, "head_dim": 32},
            "a": {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 16},
        },
        "ffns": {"s": {"kind": "swiglu", "hidden": 160}},
        "layers": ["g + s x2", "a + s"],
    },
    "zaya": {
        "mixers": {"c": {"kind": "cca", "heads": 4, "kv_heads": 2, "head_dim": 16}},
        "ffns": {"e": {"kind": "zaya_moe", "experts": 4, "hidden": 64, "router_width": 32}},
        "layers": ["c + e x3"],
        "block": {"residual_scaling": True},
    },
    "every expert": {  # whose loads are even
        "mixers": {"c": {"kind": "cca", "heads": 4, "kv_heads": 2, "head_dim": 16}},
        "ffns": {"e": {"kind": "zaya_moe", "experts": 4, "top_k": 4, "hidden": 64, "router_width": 32}},
        "layers": ["c + e x2"],
    },
    "gla": {
        "mixers": {"l": {"kind": "gla", "heads": 2}},
        "ffns": {"s": {"kind": "swiglu", "hidden": 160}},
        "layers": ["l + s x3"],
        "tie_embeddings": False,
    },
    "union hourglass": {
        "mixers": {"a": {"kind": "attention", "heads": 4}},
        "ffns": {
            "u": {"kind": "union_of_experts", "hidden": 128, "experts": 4, "top_k": 2},
            "h": {"kind": "hourglass", "hidden": 32, "depth": 3},
        },
        "layers": ["a + u", "a + h"],
    },
    "mamba2": {
        "mixers": {"m": {"kind": "mamba2", "head_dim": 32, "state_dim": 32}},
        "layers": ["m x3"],
    },
    "kat": {
        "mixers": {"a": {"kind": "attention", "heads": 4}},
        "ffns": {"k": {"kind": "kat", "hidden": 384}},
        "layers": ["a + k x2"],
    },
    "wide": {  # more parameters than anything else
        "mixers": {"a": {"kind": "attention", "heads": 4}},
        "ffns": {"s": {"kind": "swiglu", "hidden": 1024}},
        "layers": ["a + s x6"],
    },
    "mamba": {"mixers": {"m": {"kind": "mamba", "state_dim": 8}}, "layers": ["m x2"]},
    "multi-token": {
        "mixers": {"a": {"kind": "attention", "heads": 4}},
        "ffns": {"s": {"kind": "swiglu", "hidden": 160}},
        "layers": ["a + s x2"],
        "multi_token": {"layer": "a + s"},
    },
}


def config(model: str, width: int = 64, vocabulary: int = 256, length: int = 128, **sections: Any) -> RunConfig:
    """sections: of a run, joined to what is the same in all tests."""
    train = {"steps": 1, "batch": 1, "device": "cpu", "precision": "fp32", **sections.pop("train", {})}
    return RunConfig.model_validate(
        {
            "run": "run",
            "model": {"width": width, "vocabulary": vocabulary, **MODELS[model]},
            "data": {"path": "corpus", "sequence_length": length},
            "train": train,
            **sections,
        }
    )


def batches(config: RunConfig, dp: int = 1, rank: int = 0) -> list[Batch]:
    """A step's micro-batches of a data-parallel rank: rows of whole sequences of random tokens."""
    generator = torch.Generator().manual_seed(rank)
    length, rows = config.data.sequence_length, config.train.micro_batch
    assert config.model.vocabulary is not None
    made = []
    for _ in range(config.train.batch // (dp * rows)):
        tokens = torch.randint(0, config.model.vocabulary, (1, rows * length), generator=generator)
        made.append(Batch(tokens, tokens.roll(-1, 1), torch.arange(rows + 1, dtype=torch.int32) * length))
    return made
