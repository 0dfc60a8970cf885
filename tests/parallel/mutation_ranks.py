"""Runs the gate under every mutation, in ranks, and prints who was caught by what."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from parallel.mesh import MeshConfig
from parallel.processes import Processes
from pretrain.equivalence import layouts
from pretrain.equivalence.gate import Gate, short_run
from pretrain.model.decoder import DecoderConfig
from tests.parallel import (  # noqa: F401  (they register themselves)
    mutations_context,
    mutations_experts,
    mutations_pipeline,
    mutations_tensor,
)
from tests.parallel.mutations import MODELS, MUTATIONS, Mutation
from tests.ranks import TRAINING, run_ranks

CLEAN = "no mutation"


class Kill(NamedTuple):
    """What the gate said under a mutation: the faults it found, or the error that stopped it. seconds: for it alone."""

    name: str
    layout: str
    faults: list[str]
    seconds: float


def run(rank: int, world: int, names: list[str]) -> list[Kill]:
    """Runs in ranks: every layout of these mutations without one, then under each. Empty but on the first rank."""
    job = Processes(rank, world, rank, torch.device("cpu"))
    chosen = [mutation for mutation in MUTATIONS if mutation.name in names]
    gates = {
        model: Gate(short_run(DecoderConfig.model_validate(MODELS[model]), world, length=32), job)
        for model in dict.fromkeys(mutation.model for mutation in chosen)
    }
    found: list[Kill] = []
    for layout, model in dict.fromkeys((mutation.layout, mutation.model) for mutation in chosen):
        gate, title = gates[model], layout if model == "hybrid" else f"{layout}, {model}"
        mesh = mesh_of(layout, gate, world)
        start = time.perf_counter()
        clean = gate.judge(mesh)
        found.append(
            Kill(CLEAN, title, [] if clean is None or clean.agrees else clean.faults(), time.perf_counter() - start)
        )
        for mutation in (each for each in chosen if (each.layout, each.model) == (layout, model)):
            start = time.perf_counter()
            with mutation.patch(rank):
                try:
                    verdict = gate.judge(mesh)
                    faults = [] if verdict is None or verdict.agrees else verdict.faults()
                except Exception as error:
                    faults = [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
            told: list[Any] = [None] * world
            dist.all_gather_object(told, faults)
            found.append(Kill(mutation.name, title, next((f for f in told if f), []), time.perf_counter() - start))
    return found if job.first else []


def mesh_of(layout: str, gate: Gate, world: int) -> MeshConfig:
    """`cut=2+1`: layers of the stages; ` of 4`: ranks."""
    parts = layout.split(" of ")[0].split(",")
    mesh = layouts.parse(",".join(part for part in parts if not part.startswith("cut=")), gate.config, world)
    cuts = [part.removeprefix("cut=").split("+") for part in parts if part.startswith("cut=")]
    return mesh.model_copy(update={"pp_layers": [int(layers) for layers in cuts[0]]}) if cuts else mesh


def kills(mutations: list[Mutation], timeout: float = 600) -> list[Kill]:
    """One set of ranks for all layouts of as many ranks."""
    found: list[Kill] = []
    for world in sorted({mutation.world for mutation in mutations}):
        names = [mutation.name for mutation in mutations if mutation.world == world]
        found += run_ranks(run, world, names, timeout=timeout, preload=TRAINING)[0]
    return found


def table(found: list[Kill]) -> str:
    """One line a mutation: caught by what, or that it survived."""
    lines = []
    for kill in found:
        if kill.name == CLEAN:
            lines.append(
                f"\n{kill.layout}: without a mutation {'agrees' if not kill.faults else f'DIFFERS {kill.faults}'}"
            )
        else:
            lines.append(f"  {kill.name:44} {_caught_by(kill.faults)}  ({kill.seconds:.1f} s)")
    dead = sum(bool(kill.faults) for kill in found if kill.name != CLEAN)
    return "\n".join([*lines, f"\n{dead} of {sum(kill.name != CLEAN for kill in found)} mutations caught"])


def _caught_by(faults: list[str]) -> str:
    """The fault in gradients, or the first other one, and in what else there was one."""
    if not faults:
        return "SURVIVED"
    shown = next((fault for fault in faults if fault.startswith("gradient")), faults[0])
    others = [fault.split(" ")[0] for fault in faults if fault != shown]
    return shown + (f"; also {', '.join(others)}" if others else "")


def main() -> int:
    found = kills(MUTATIONS)
    print(table(found))
    return int(any(bool(kill.faults) == (kill.name == CLEAN) for kill in found))
