"""Small jobs and made-up machines with round numbers, for the planner's tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from launch.plan.chip import Chip
from launch.plan.forecast import Planner
from launch.plan.legal import Legality
from launch.plan.source import Question, ask
from pretrain.config import RunConfig
from pretrain.estimate.costs import Collective, Matmul, RankCosts, StageCosts
from pretrain.estimate.model import ModelCosts

RUN: dict[str, Any] = {
    "run": "runs/x",
    "model": {
        "vocabulary": 512,
        "width": 64,
        "mixers": {
            "attention": {"kind": "attention", "heads": 4, "head_dim": 16},
            "gdn": {"kind": "gated_delta_net", "heads": 4, "head_dim": 16},
        },
        "ffns": {
            "mlp": {"kind": "swiglu", "hidden": 128},
            "moe": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 64},
        },
        "layers": ["gdn + mlp", "attention + moe"],
        "repeat": 2,
    },
    "data": {"path": "data/x", "sequence_length": 1024},
    "train": {"steps": 1000, "batch": 64, "micro_batch": 1},
}
COUNTED: dict[str, ModelCosts] = {}  # by model: to follow one takes a second
OF = ModelCosts.of
BANDWIDTH = 1e11  # of the unit chip
HARDWARE = """
name: Round
bf16_tflops: 100
fp32_tflops: 10
memory_gib: {memory}
memory_bandwidth_gbs: 1000
fabric:
  node: {{kind: switch, gpus: 8, gpu_gbs: 100, hop_us: 0}}
  network: {{nics: 8, nic_gbits: 80, hop_us: 0}}
  launch_us: 0
"""


def files(folder: Path, memory: float = 16, **sections: dict[str, Any]) -> tuple[Path, Path]:
    """(a run file, a hardware file)."""
    run = {**RUN, **{name: {**RUN.get(name, {}), **fields} for name, fields in sections.items()}}
    config, hardware = folder / "run.yaml", folder / "round.yaml"
    config.write_text(yaml.safe_dump(run))
    hardware.write_text(HARDWARE.format(memory=memory))
    return config, hardware


def question(
    folder: Path, gpus: int, *overrides: str, memory: float = 16, **sections: dict[str, Any]
) -> tuple[Question, Planner, Legality]:
    config, hardware = files(folder, memory, **sections)
    asked = ask(config, hardware, gpus, overrides, headroom=0.0)
    asked = replace(asked, model=counted(asked.config))
    return asked, Planner(asked), Legality(asked.model.model)


def counted(config: RunConfig, book: Any = None) -> ModelCosts:
    """What ModelCosts.of gives; of a model that a test has followed already, the very same."""
    key = config.model.model_dump_json() + config.optimizer.model_dump_json()
    if key not in COUNTED:
        COUNTED[key] = OF(config)
    return COUNTED[key]


def chip(ramp: float = 0.0) -> Chip:
    """1 TFLOP/s, 100 GB/s."""
    return Chip("Unit", "bf16", 2e12, 1e12, BANDWIDTH, 2.0**30, ramp)


def costs(
    stages: int = 1,
    micro_batches: int = 1,
    seconds: float = 1.0,
    collectives: tuple[Collective, ...] = (),
    recomputed: float = 0.0,
    parameters: int = 0,
) -> RankCosts:
    """Equal stages of one product a micro-batch that takes `seconds` for all micro-batches at 1 TFLOP/s, forward and backward."""
    rows = seconds * 1e12 / micro_batches / (3 * 2 * 1000 * 1000)
    product = Matmul("product", rows, 1000, 1000, micro_batches)
    flops = 3 * product.flops * product.calls
    stage = StageCosts(
        layers=(0,), parameters=parameters, weights=0.0, gradients=0.0, optimizer=0.0, activations=0.0, buffers=0.0,
        peak=0.0, flops=flops, recomputed=recomputed * flops, remade=0.0, update=0.0, matmuls=(product,), collectives=collectives,
    )  # fmt: skip
    return RankCosts(
        parameters=parameters, weights=0.0, gradients=0.0, optimizer=0.0, activations=0.0, buffers=0.0, peak=0.0,
        flops=flops, recomputed=recomputed * flops, remade=0.0, update=0.0, matmuls=(product,), collectives=collectives,
        bubble=(stages - 1) / (micro_batches + stages - 1), stages=(stage,) * stages, micro_batches=micro_batches,
        tokens=1000,
    )  # fmt: skip
