"""Five small models for the equivalence gate, which together have every kind of message between ranks, and the gate in ranks."""

from __future__ import annotations

from typing import Any

import torch

from parallel.mesh import MeshConfig
from parallel.processes import Processes
from pretrain.equivalence.compare import Verdict
from pretrain.equivalence.gate import judge, short_run
from pretrain.model.decoder import DecoderConfig

Verdicts = dict[str, tuple[bool, list[str], str]]

MODELS: dict[str, dict[str, Any]] = {
    # Grouped and multi-query heads, a window, sigmoid routing with a bias, groups, a shared expert, all balancing losses.
    "attention MoE": {
        "mixers": {
            "attention": {"kind": "attention", "heads": 4, "kv_heads": 2, "rope_fraction": 0.5},
            "window": {"kind": "attention", "heads": 4, "kv_heads": 1, "window": 12, "out_bias": True},
        },
        "ffns": {
            "dense": {"kind": "swiglu", "hidden": 32},
            "moe": {
                "kind": "moe", "experts": 8, "top_k": 2, "hidden": 16, "shared_hidden": 16, "groups": 2, "top_groups": 1,
                "batch_loss": 0.05, "sequence_loss": 0.05, "z_loss": 0.01,
            },
        },
        "layers": ["window + dense", "attention + moe x2"],
    },
    # As Qwen3-Next: delta rule and gated attention, softmax routing, a gated shared expert, untied embeddings.
    "GDN hybrid MoE": {
        "mixers": {
            "gdn": {"kind": "gated_delta_net", "heads": 4, "value_heads": 8, "head_dim": 8},
            "attention": {
                "kind": "attention", "heads": 4, "kv_heads": 2, "zero_centered_norm": True, "output_gate": True,
            },
        },
        "ffns": {
            "moe": {
                "kind": "moe", "experts": 8, "top_k": 3, "hidden": 16, "shared_hidden": 16, "shared_gate": True,
                "gate": "softmax", "bias_rate": 0.0, "batch_loss": 0.05,
            },
        },
        "layers": ["gdn + moe x2", "attention + moe"],
        "block": {"zero_centered_norms": True},
        "tie_embeddings": False,
    },
    # As ZAYA1: convolutional attention, a router whose state runs along depth, one expert a token, residual scaling.
    "CCA + ZAYA router": {
        "mixers": {"cca": {"kind": "cca", "heads": 4, "kv_heads": 4, "head_dim": 8}},
        "ffns": {"moe": {"kind": "zaya_moe", "experts": 8, "hidden": 16, "router_width": 16, "skip": "zero"}},
        "layers": ["cca + moe x3"],
        "block": {"residual_scaling": True},
    },
    "GLA": {
        "mixers": {"gla": {"kind": "gla", "heads": 4, "conv_width": 4, "gate_rank": 8}},
        "ffns": {"swiglu": {"kind": "swiglu", "hidden": 32}},
        "layers": ["gla + swiglu x3"],
    },
    # Routed heads and routed shards of a dense feed-forward, a stack of narrow ones, norms on both sides.
    "UoE + Hourglass": {
        "mixers": {"smha": {"kind": "smha", "heads": 4, "top_k": 2}},
        "ffns": {
            "union": {"kind": "union_of_experts", "hidden": 32, "experts": 4, "top_k": 2, "balance_loss": 0.05},
            "hourglass": {"kind": "hourglass", "hidden": 16, "depth": 2},
        },
        "layers": ["smha + union", "smha + hourglass", "smha + union"],
        "block": {"norm": "peri"},
    },
}  # fmt: skip


def config(name: str) -> DecoderConfig:
    return DecoderConfig.model_validate({"vocabulary": 64, "width": 32, "init_std": 0.15, **MODELS[name]})


def verdicts(rank: int, world: int, wanted: list[tuple[str, list[MeshConfig]]]) -> dict[str, Verdicts]:
    """Runs in ranks: by model and layout whether it agrees, in what it does not, and its numbers. Empty but on the first rank."""
    job = Processes(rank, world, rank, torch.device("cpu"))
    found: dict[str, Verdicts] = {}
    for model, meshes in wanted:
        answer = judge(short_run(config(model), world), meshes, job)
        found[model] = {
            layout: (verdict.agrees, verdict.faults(), _numbers(verdict)) for layout, verdict in answer.items()
        }
    return found


def _numbers(verdict: Verdict) -> str:
    worst = f"loss {verdict.loss.error:.0e} gradient {verdict.gradient.error:.0e} update {verdict.update.error:.0e}"
    return worst if verdict.double is None else f"{worst}; in fp64 gradient {verdict.double.gradient.error:.0e}"
