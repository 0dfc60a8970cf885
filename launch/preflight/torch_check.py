"""Whether torch starts, sees the GPUs that the driver sees, and has code for them."""

from __future__ import annotations

import re

from launch.preflight.check import Check, Result, failed, not_checked, passed, warned
from launch.preflight.gpus import inventory
from launch.preflight.node import Node

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")


def torch(node: Node) -> list[Result]:
    found = inventory(node)  # before torch runs here, which would count as a foreign process
    probed = node.torch()
    built = probed.stages.get("import")
    if built is None:
        where = f" while in: {probed.hung_in}" if probed.hung_in else ""
        return [failed(f"torch does not start: {probed.answer.why}{where}")]
    if "error" in built:
        if "No module named 'torch'" in built["error"]:
            return [not_checked("torch is not installed in this environment")]
        return [failed(f"torch cannot be imported: {built['error']}")]
    runtime = (
        f"CUDA {built['cuda']}"
        if built["cuda"]
        else f"ROCm {built['hip']}"
        if built["hip"]
        else "neither CUDA nor ROCm"
    )
    text = f"torch {built['version']} with {runtime}"
    seen = probed.stages.get("devices")
    if seen is None:
        return [failed(f"{text} does not come back from listing the GPUs: {probed.answer.why}", **built)]
    if seen["error"]:
        return [failed(f"{text} cannot use the GPUs: {seen['error']}", **built)]
    values = {**built, **seen}
    here, count = len(found.gpus), len(seen["devices"])
    if not here and not count:
        return [passed(f"{text}; no GPU to compare with", **values)]
    if here and not built["cuda"] and not built["hip"]:
        return [failed(f"{text}, but there are {here} GPU(s): install the build for them", **values)]
    text += f", {'RCCL' if built['hip'] else 'NCCL'} {seen['nccl']}, sees {count} GPU(s)"
    results = []
    hidden = ", ".join(f"{name}={node.environ[name]!r}" for name in VISIBLE if name in node.environ)
    if here and count != here:
        if hidden and count:
            results.append(warned(f"{text} of {here} (by {hidden})", **values))
        else:
            results.append(failed(f"{text} of {here}" + (f" (by {hidden})" if hidden else ""), **values))
    unserved = sorted({device["arch"] for device in seen["devices"] if not served(device["arch"], seen["archs"])})
    if unserved:
        have = ", ".join(seen["archs"])
        results.append(failed(f"{text}, but has no code for {', '.join(unserved)} (it has {have})", **values))
    if built["cuda"] and found.cuda and int(built["cuda"].split(".")[0]) > int(found.cuda.split(".")[0]):
        results.append(failed(f"{text}, but the driver serves CUDA {found.cuda} at most: update the driver", **values))
    return results or [passed(text, **values)]


def served(arch: str, archs: list[str]) -> bool:
    """Whether a build with code for `archs` runs on a device. CUDA code runs on later minor versions; PTX on all later ones."""
    if not archs or arch in archs:
        return True
    if arch.startswith("gfx"):
        return any(name.split(":")[0] == arch for name in archs)
    own = _version(arch)
    for name in archs:
        there = _version(name)
        if own and there and (there <= own if name.startswith("compute") else own[0] == there[0] and there <= own):
            return True
    return False


def _version(arch: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(?:sm|compute)_(\d+)(\d)[a-z]*", arch)
    return (int(match[1]), int(match[2])) if match else None


CHECKS = (
    Check("torch", "whether torch starts, sees the driver's GPUs, and was built for them; NCCL or RCCL version", torch),
)
