"""Proves that a model trains the same on every layout of ranks: `torchrun --nproc-per-node N -m pretrain.equivalence --config X`.

Each layout takes a few steps on the same batches as one rank alone, in fp32. Loss, every parameter's gradient and every update
are compared by name. A lost reduction or a gradient counted twice usually leaves the loss looking normal; it does not pass this.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.exit import ERROR, FINISHED, USAGE

if TYPE_CHECKING:
    from torch import Tensor

    from parallel.mesh import MeshConfig
    from parallel.processes import Processes
    from pretrain.config import RunConfig
    from pretrain.data.batch import Batch

EXAMPLES = """examples:
  torchrun --nproc-per-node 2 -m pretrain.equivalence --config configs/runs/quickstart.yaml
  torchrun --nproc-per-node 4 -m pretrain.equivalence --config configs/models/zaya1_8b.yaml --layouts tp=2,ep=4 cp=2
Exit codes: 0 all layouts agree with one rank, 1 one differs, 2 bad usage or configuration."""

TOLERANCE = 1e-5
# What a shrunk model has instead: enough of everything for 4 ranks to share, and little enough for a laptop.
SMALL = {
    "width": 64, "vocabulary": 256, "head_dim": 16, "value_dim": 16, "hidden": 64, "shared_hidden": 64, "kv_rank": 32,
    "query_rank": 32, "shared_dim": 8, "router_width": 16, "state_dim": 16, "rank": 8, "gate_rank": 8, "window": 12, "lift": 96,
}  # fmt: skip
MOST = {
    "heads": 4,
    "kv_heads": 4,
    "value_heads": 8,
    "experts": 8,
    "top_k": 2,
    "groups": 2,
    "top_groups": 1,
    "parts": 2,
    "depth": 2,
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.equivalence",
        description="Compare training on every layout of the ranks with training on one.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="a run file or a model file")
    parser.add_argument(
        "--layouts", nargs="+", metavar="LAYOUT", help="such as tp=2,cp=2; default: every legal one of these ranks"
    )
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="steps of each layout (default 2)")
    parser.add_argument("--length", type=int, default=64, metavar="N", help="tokens of a packed row (default 64)")
    parser.add_argument("--as-it-is", action="store_true", help="do not shrink the model")
    return parser.parse_args(argv)


def shrink(model: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A model of the same kinds, small enough for a CPU: (the smaller section, what was changed)."""
    said: list[str] = []

    def smaller(section: dict[str, Any], where: str) -> dict[str, Any]:
        made = {}
        for key, value in section.items():
            new = value
            if isinstance(value, dict):
                new = smaller(value, f"{where}{key}.")
            elif isinstance(value, int) and not isinstance(value, bool):
                new = min(value, SMALL.get(key, MOST.get(key, value)))
            elif isinstance(value, list) and key == "hidden":
                new = [min(width, SMALL["hidden"]) for width in value]
            if new != value and not isinstance(value, dict):
                said.append(f"{where}{key} {value} -> {new}")
            made[key] = new
        return made

    made = smaller(model, "")
    made["vocabulary"] = SMALL["vocabulary"]
    layers = list(dict.fromkeys(entry.split(" x")[0].strip() for entry in made["layers"]))
    layers = layers * (1 if len(layers) > 1 else 2)
    if layers != made["layers"] or made.get("repeat", 1) > 1:
        said.append(f"layers {made['layers']} x {made.get('repeat', 1)} -> {layers}")
    return {**made, "layers": layers, "repeat": 1, "init_std": 0.1}, said


@dataclass
class Outcome:
    """losses: of each step. gradients: of the first step, and parameters after the last, whole. spread: between their holders."""

    losses: list[float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    spread: float


def run(config: RunConfig, job: Processes, batches: list[list[Batch]]) -> Outcome:
    """Trains on the given global batches, a list of rows for each step. Collective over the job."""
    import torch

    from parallel.engines.torch import TorchEngine
    from parallel.mesh import Mesh
    from parallel.whole import assemble, gradients
    from pretrain.model.decoder import Decoder
    from pretrain.train.build import engine_for

    mesh = Mesh(config.mesh, job)
    torch.manual_seed(config.train.seed)
    model = Decoder(config.model).to(job.device)
    engine = engine_for(config, mesh, model)
    assert isinstance(engine, TorchEngine)
    losses: list[float] = []
    first: dict[str, Tensor] = {}
    spread = 0.0
    for step, rows in enumerate(batches):
        mine = [row.to(job.device) for row in rows[mesh.dp_rank :: mesh.dp_size]]
        share = engine.forward_backward(mine, float(sum(row.scored for row in rows)))
        engine.reduce()
        if step == 0:
            first, differences = assemble(gradients(engine.model))
            spread = max(differences.values(), default=0.0)
        engine.update(config.optimizer.lr)
        losses.append(job.sum([share.item()])[0])
    state = {name: tensor for name, tensor in engine.state_tensors().items() if name.startswith("model/")}
    parameters, differences = assemble(state)
    return Outcome(losses, first, parameters, max(spread, max(differences.values(), default=0.0)))


def rows(steps: int, count: int, length: int, vocabulary: int) -> list[list[Batch]]:
    """Packed rows of random tokens with random borders, `count` for each step."""
    import torch

    from pretrain.data.batch import IGNORE, Batch

    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(steps * count):
        tokens = torch.randint(0, vocabulary, (1, length), generator=generator)
        borders = (torch.randperm(length - 1, generator=generator)[:3] + 1).sort().values
        targets = tokens.roll(-1, dims=1)
        targets[:, torch.cat((borders - 1, torch.tensor([length - 1])))] = IGNORE
        made.append(Batch(tokens, targets, torch.tensor([0, *borders.tolist(), length], dtype=torch.int32)))
    return [made[step * count : (step + 1) * count] for step in range(steps)]


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """(largest difference as a share of the tensor's largest number, the tensor's name). A missing tensor counts as infinite."""
    worst_of_all, name_of_it = 0.0, ""
    for name in dict.fromkeys([*expected, *found]):
        if name not in found or name not in expected:
            return float("inf"), f"{name} ({'missing' if name not in found else 'not there on one rank'})"
        scale = max(float(expected[name].abs().max()), 1e-6) if expected[name].numel() else 1.0
        error = (
            float((found[name].double() - expected[name].double()).abs().max()) / scale
            if expected[name].numel()
            else 0.0
        )
        if not error <= worst_of_all:
            worst_of_all, name_of_it = error, name
    return worst_of_all, name_of_it


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    from parallel import processes
    from pretrain.config import ConfigError

    try:
        config, said = _configuration(arguments)
        meshes = _layouts(arguments.layouts, config, int(os.environ.get("WORLD_SIZE", 1)))
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return USAGE
    job = processes.join(config.train.device)
    try:
        return _compare(config, said, meshes, job, arguments)
    finally:
        processes.leave()


def _compare(
    config: RunConfig, said: list[str], meshes: list[MeshConfig], job: Processes, arguments: argparse.Namespace
) -> int:
    from rich.console import Console
    from rich.table import Table

    from parallel.mesh import MeshConfig
    from parallel.processes import Processes

    batches = rows(arguments.steps, 2 * job.world, arguments.length, config.model.vocabulary or 0)
    alone = run(config.model_copy(update={"mesh": MeshConfig()}), Processes(0, 1, job.local_rank, job.device), batches)
    table = Table("layout", "loss", "gradient", "where", "update", "where", "", box=None, pad_edge=False)
    different = 0
    for mesh in meshes:
        found = run(config.model_copy(update={"mesh": mesh}), job, batches)
        loss = max(abs(a - b) / abs(b) for a, b in zip(found.losses, alone.losses))
        gradient, update = worst(found.gradients, alone.gradients), worst(found.parameters, alone.parameters)
        agrees = max(loss, gradient[0]) <= TOLERANCE and update[0] <= 20 * TOLERANCE and found.spread == 0.0
        different += not agrees
        verdict = "equal" if agrees else "DIFFERS" + (f", copies by {found.spread:.0e}" if found.spread else "")
        table.add_row(
            name(mesh), f"{loss:.0e}", f"{gradient[0]:.0e}", gradient[1], f"{update[0]:.0e}", update[1], verdict
        )
        if job.first:
            print(f"{name(mesh)}: {verdict}", file=sys.stderr, flush=True)
    if job.first:
        console = Console() if sys.stdout.isatty() else Console(width=200)
        for line in said:
            console.print(f"shrunk: {line}", markup=False)
        console.print(table)
        console.print(
            f"{len(meshes) - different} of {len(meshes)} layouts of {job.world} rank(s) train as one rank does"
        )
    return ERROR if different else FINISHED


def name(mesh: MeshConfig) -> str:
    """tp=2 cp=2"""
    given = mesh.model_dump(exclude_defaults=True)
    return " ".join(f"{key}={value}" for key, value in given.items()) or "data parallel"


def _configuration(arguments: argparse.Namespace) -> tuple[RunConfig, list[str]]:
    from pydantic import ValidationError

    from pretrain.config import ConfigError, RunConfig, explain, read_yaml
    from pretrain.model.files import model_section

    raw = read_yaml(arguments.config)
    try:
        section = model_section(raw.get("model"), arguments.config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(section, dict) or "layers" not in section:
        raise ConfigError(f"{arguments.config}: has no section `model:` with layers; give a model file or a run file")
    said: list[str] = []
    if not arguments.as_it_is:
        section, said = shrink(section)
    whole = {
        "run": "runs/none",
        "model": section,
        "data": {"path": "none", "sequence_length": arguments.length},
        "train": {"steps": arguments.steps, "batch": 1, "precision": "fp32"},
        "optimizer": {"kind": "adamw", "lr": 1e-3, "eps": 1e-4},
    }
    try:
        return RunConfig.model_validate(whole), said
    except ValidationError as error:
        raise ConfigError("\n".join(f"{arguments.config}: {line}" for line in explain(error, whole))) from None


def _layouts(wanted: list[str] | None, config: RunConfig, world: int) -> list[MeshConfig]:
    """The layouts that are asked for, or all that this model and these ranks allow."""
    from pydantic import ValidationError

    from parallel.grid import MeshConfig, layouts
    from pretrain.config import ConfigError, explain
    from pretrain.train import layout

    if wanted is not None:
        made = []
        for text in wanted:
            pairs = dict(part.partition("=")[::2] for part in text.split(","))
            try:
                mesh = MeshConfig.model_validate(pairs)
            except ValidationError as error:
                raise ConfigError("\n".join(f"--layouts {text}: {line}" for line in explain(error, pairs))) from None
            layout.check(config.model_copy(update={"mesh": mesh}), world)
            made.append(mesh)
        return made
    legal = []
    for mesh in layouts(world):
        try:
            layout.check(config.model_copy(update={"mesh": mesh}), world)
        except ConfigError:
            continue
        legal.append(mesh)
    return legal


if __name__ == "__main__":
    sys.exit(main())
