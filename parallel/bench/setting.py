"""What the options mean on this machine and in this job: which backend, which measurements, against which ceiling."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from parallel.bench import files
from parallel.bench.groups import Shape
from parallel.bench.operations import Operation
from parallel.bench.options import GLOO_SIZES, GPU_SIZES
from parallel.bench.sizes import parse_sizes
from parallel.bench.timing import Control, Plan
from parallel.fabric.topology import Fabric

HARDWARE = Path(__file__).resolve().parents[2] / "configs" / "hardware"


def tasks(
    options: argparse.Namespace, backend: str, shapes: Sequence[Shape], operations: Sequence[Operation]
) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """(shape's name, fields of its Task) in the order of measurement, and notes on what is left out. Raises ValueError."""
    sizes = options.sizes or parse_sizes(GLOO_SIZES if backend == "gloo" else GPU_SIZES, options.factor)
    tasks, notes = [], []
    for shape in shapes:
        if options.root >= shape.size and any(operation.rooted for operation in operations):
            raise ValueError(
                f"--root {options.root}: the groups of {shape.name} have {shape.size} rank(s), at places 0 to {shape.size - 1}"
            )
        for operation in operations:
            places = _places(options.place, operation)
            if shape.size < operation.least_ranks:
                notes.append(f"{operation.name} over {shape.name} left out: it takes {operation.least_ranks} ranks")
                continue
            if not places:
                notes.append(f"{operation.name} left out: it has no in-place form")
                continue
            for dtype in options.dtypes if operation.moves else options.dtypes[:1]:
                tasks.append(
                    (
                        shape.name,
                        {
                            "operation": operation,
                            "dtype": dtype,
                            "places": places,
                            "sizes": tuple(sizes),
                            "redop": options.redop,
                            "root": options.root,
                            "imbalance": options.imbalance,
                        },
                    )
                )
    if not tasks:
        raise ValueError("nothing to measure: " + "; ".join(dict.fromkeys(notes)))
    return tasks, list(dict.fromkeys(notes))


def _places(place: str, operation: Operation) -> tuple[bool, ...]:
    if place == "both" or not operation.moves:
        return operation.places
    wanted = operation.native if place == "native" else place == "in"
    return (wanted,) if wanted in operation.places else ()


def plan(options: argparse.Namespace) -> Plan:
    return Plan(
        options.warmup,
        options.iterations,
        options.confidence / 100,
        options.min_iterations,
        options.max_iterations,
        options.max_seconds,
        options.isolated,
    )


def backend(options: argparse.Namespace) -> str:
    """nccl, rccl or gloo. Raises ValueError where it cannot be had, and for options that need a GPU."""
    there = torch.cuda.is_available()
    gpu = "rccl" if torch.version.hip else "nccl"
    asked = options.backend
    if asked == "auto":
        asked = gpu if there else "gloo"
    if asked != "gloo":
        if not there:
            raise ValueError(
                f"--backend {asked} needs a GPU, and torch {torch.__version__} sees none; use --backend gloo"
            )
        if asked == "rccl" and gpu == "nccl":
            raise ValueError("--backend rccl is AMD's, and this torch is built for NVIDIA; use --backend nccl")
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local} has no GPU of its own: this node has {torch.cuda.device_count()}; "
                "start fewer processes a node, or use --backend gloo"
            )
        return gpu
    given = {
        "--cuda-graph": options.cuda_graph,
        "--stream": options.stream,
        "--high-priority": options.high_priority,
    }
    asked_for = ", ".join(name for name, value in given.items() if value)
    if asked_for:
        why = "--backend gloo runs on CPUs" if there else f"torch {torch.__version__} sees none"
        raise ValueError(f"{asked_for}: only with a GPU, and {why}; leave it out")
    if options.redop == "avg":
        raise ValueError("--redop avg: gloo has no average; use --redop sum")
    return "gloo"


def fabric(path: Path) -> Fabric:
    """The fabric of a hardware file, or of configs/hardware/NAME.yaml. Raises ValueError."""
    file = path if path.exists() else HARDWARE / f"{path.name.removesuffix('.yaml')}.yaml"
    if not file.exists():
        names = ", ".join(sorted(each.stem for each in HARDWARE.glob("*.yaml")))
        raise ValueError(f"--hardware {path}: no such file" + (f"; there are {names}" if names else ""))
    try:
        section = (yaml.safe_load(file.read_text()) or {}).get("fabric")
    except (OSError, UnicodeDecodeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"--hardware {file}: cannot be read: {' '.join(str(error).split())}") from None
    if section is None:
        raise ValueError(f"--hardware {file}: it has no `fabric:` section, so there is no ceiling to compare with")
    try:
        return Fabric.model_validate(section)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ValueError(f"--hardware {file}: fabric.{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


def ceilings(fabric: Fabric | None, shape: Shape, operations: Sequence[Operation], node: int) -> dict[str, float]:
    """GB/s of busbw by operation. Raises ValueError for groups that the fabric cannot hold."""
    if fabric is None or shape.size == 1:
        return {}
    inside = sum(rank * shape.stride < node for rank in range(shape.size))
    return {
        each.name: fabric.ceiling(each.definition or each.name, shape.size, inside) for each in operations if each.moves
    }


def node_size(options: argparse.Namespace, control: Control) -> int:
    """Ranks of a node, by the option or the launcher. Collective. Raises ValueError where they are not the same everywhere."""
    processes = control.processes
    if options.node_size:
        return int(options.node_size)
    here = ranks_here()
    most, least = control.maxima([float(here), -float(here)])
    if most != -least and any(word in ("node", "rail") for word in options.groups):
        raise ValueError(
            f"--groups node and rail need as many ranks on every node, and here are {-least:g} to {most:g}; "
            "start the same number everywhere, or set --node-size"
        )
    return min(int(most), processes.world)


def ranks_here() -> int:
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1))


def unwritable(options: argparse.Namespace) -> str | None:
    for name in ("json", "csv", "plot"):
        path = getattr(options, name)
        problem = files.writable(path) if path is not None else None
        if problem:
            return f"--{name}: {problem}"
    return None
