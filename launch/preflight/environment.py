"""The environment that a job would inherit: what is set, what hurts, what does not fit this node."""

from __future__ import annotations

import re
from pathlib import Path

from launch.preflight.check import Check, Result, failed, not_checked, passed, warned
from launch.preflight.gpus import inventory
from launch.preflight.node import Node
from launch.preflight.variables import FAMILIES, RULES, harmful

COLLECTIVES = re.compile(r"lib(nccl|rccl)[^/]*\.so")


def environment(node: Node) -> list[Result]:
    environ = node.environ
    results = [Result(status, why, setting) for status, setting, why in harmful(environ)]
    results += [*_names(node), *_threads(node), *_paths(node), *_visible(node)]
    known = {name: value for name, value in sorted(environ.items()) if FAMILIES.match(name)}
    shown = ", ".join(f"{name}={value}" for name, value in known.items())
    count = sum(len(rule.names) for rule in RULES)
    if not results:
        set_ = f"set here: {shown}" if known else "none of their families is set"
        return [passed(f"none of {count} variables that hurt; {set_}", set=known)]
    if known:  # for whoever reads the file; the table has those that matter
        first = results[0]
        results[0] = Result(first.status, first.text, first.subject, {**first.values, "set": known})
    return results


def recommended(node: Node) -> list[Result]:
    """What configs/hardware/ advises for these GPUs, and is not set or set otherwise."""
    gpus = inventory(node).gpus
    if not gpus:
        return [not_checked("no GPU here to look up")]
    from pretrain.estimate.hardware import named
    from pretrain.exit import Exit

    try:
        hardware = named(gpus[0].name)
    except Exit as error:
        return [failed(str(error))]
    if hardware is None:
        return [not_checked(f"configs/hardware/ has no file for {gpus[0].name or 'a GPU of unknown name'}")]
    missing = [f"{name}={value}" for name, value in hardware.environment.items() if name not in node.environ]
    other = [
        f"{name}={node.environ[name]} (advised: {value})"
        for name, value in hardware.environment.items()
        if node.environ.get(name, value) != value
    ]
    results = []
    if missing:
        hint = 'eval "$(python -m launch.environment_of)"; launch/slurm.sh does that'
        results.append(warned(f"not set: {', '.join(missing)}: {hint}", missing=missing))
    if other:
        results.append(warned(f"set otherwise than advised for {hardware.name}: {', '.join(other)}", other=other))
    return results or [passed(f"as advised for {hardware.name}: {len(hardware.environment)} variable(s)")]


def _names(node: Node) -> list[Result]:
    """Interfaces and cards that are named and not here."""
    results = []
    interfaces = [folder.name for folder in node.folders("sys/class/net")]
    cards = [folder.name for folder in node.folders("sys/class/infiniband")]
    wanted = (
        ("NCCL_SOCKET_IFNAME", interfaces), ("GLOO_SOCKET_IFNAME", interfaces), ("NCCL_IB_HCA", cards),
    )  # fmt: skip
    for name, there in wanted:
        value = node.environ.get(name, "").strip()
        if not value or value.startswith("^"):  # "^" leaves out
            continue
        exact = value.startswith("=") or name.startswith("GLOO")
        parts = [part.split(":")[0].strip() for part in value.lstrip("=").split(",")]
        absent = [p for p in parts if p and not any(t == p if exact else t.startswith(p) for t in there)]
        if not there:
            continue
        if absent and (len(absent) == len(parts) or name.startswith("GLOO")):
            text = f"there is no {', '.join(absent)} here, but {', '.join(there)}"
            results.append(failed(text, f"{name}={value}"))
        elif absent:
            results.append(warned(f"there is no {', '.join(absent)} here, only the others", f"{name}={value}"))
        elif parts == ["lo"]:
            results.append(warned("nodes cannot reach each other by the loopback interface", f"{name}={value}"))
    file = node.environ.get("NCCL_TOPO_FILE")
    if file and not Path(file).exists():
        results.append(failed("there is no such file", f"NCCL_TOPO_FILE={file}"))
    return results


def _threads(node: Node) -> list[Result]:
    from parallel.cores import members

    match = re.search(r"^Cpus_allowed_list:\s*(\S+)", node.read("proc/self/status") or "", re.MULTILINE)
    allowed = len(members(match[1])) if match else 0
    ranks = int(text) if (text := node.environ.get("LOCAL_WORLD_SIZE", "")).isdigit() else 0
    ranks = ranks or len(inventory(node).gpus) or 1
    results = []
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        value = node.environ.get(name)
        if value is None:
            continue
        first = value.split(",")[0].strip()
        if not first.isdigit() or int(first) < 1:
            results.append(failed("is no number of threads", f"{name}={value}"))
        elif allowed and int(first) * ranks > allowed:
            text = f"{ranks} rank(s) with {first} threads each, for {allowed} CPUs: threads wait for each other"
            results.append(warned(text, f"{name}={value}"))
    return results


def _paths(node: Node) -> list[Result]:
    """Libraries that come before the ones torch was built with."""
    value = node.environ.get("LD_LIBRARY_PATH", "")
    found = []
    for folder in filter(None, value.split(":")):
        try:
            found += [str(file) for file in sorted(Path(folder).iterdir()) if COLLECTIVES.match(file.name)]
        except OSError:
            continue
    if not found:
        return []
    text = f"{found[0]} is loaded in the place of torch's own NCCL or RCCL: its version must fit (see check torch)"
    return [warned(text, "LD_LIBRARY_PATH", files=found)]


def _visible(node: Node) -> list[Result]:
    given = [n for n in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES") if n in node.environ]
    amd = any(gpu.vendor == "amd" for gpu in inventory(node).gpus)
    if amd and "ROCR_VISIBLE_DEVICES" in given and len(given) > 1:
        text = "the others count among what ROCR_VISIBLE_DEVICES leaves: set one of them only"
        return [warned(text, " ".join(f"{name}={node.environ[name]}" for name in given))]
    return []


CHECKS = (
    Check(
        "environment",
        "variables of NCCL, RCCL, torch, OMP, HSA and the like that hurt, each with its reason",
        environment,
    ),
    Check("recommended", "variables that configs/hardware/ advises for these GPUs", recommended),
)
