"""Versions of Python packages against what was tested together, and against what this project needs at least."""

from __future__ import annotations

import importlib.metadata as metadata
import re
import sys
import tomllib

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from launch.preflight.check import Check, Result, failed, not_checked, passed, warned
from launch.preflight.node import REPOSITORY, Node

SHOWN = ("torch", "triton", "deepspeed", "megatron-core")
# A CUDA or ROCm build of torch brings Triton under another name.
OTHER_NAMES = {"triton": ("pytorch-triton", "pytorch-triton-rocm", "triton-rocm")}


def packages(node: Node) -> list[Result]:
    tested = _tested(node)
    if tested is None:
        return [not_checked(f"{node.constraints} cannot be read")]
    needed = {requirement.name.lower(): requirement for requirement in requirements()}
    names = [*dict.fromkeys((*SHOWN, *(name for name in needed if name in tested)))]
    results, good = [], {}
    for name in names:
        have = installed(name)
        want = tested.get(name)
        requirement = needed.get(name)
        values = {"installed": have, "tested": want}
        if have is None:
            # Triton is no requirement: without a GPU, the CPU's kernels do.
            text = "is not installed" + (f"; tested with {want}" if want else "")
            judge = failed if requirement is not None else warned
            results.append(judge(f"{text}: pip install '{requirement or name}'", name, **values))
        elif requirement is not None and not _fits(requirement, have):
            results.append(failed(f"{have}, but this needs {requirement.specifier}", name, **values))
        elif want is not None and have.split("+")[0] != want:
            results.append(warned(f"{have}, tested with {want}", name, **values))
        else:
            good[name] = have
    if sys.version_info < (3, 11):  # noqa: UP036 (whoever runs this may not have installed it by pip)
        results.append(failed(f"{sys.version.split()[0]}, but this needs 3.11", "python"))
    if good:
        main = ", ".join(f"{name} {good[name]}" for name in SHOWN if name in good)
        rest = len(good) - sum(name in good for name in SHOWN)
        text = ", ".join(filter(None, [main, f"{rest} others" if rest else ""]))
        results.append(passed(f"{text}, as tested; Python {sys.version.split()[0]}", installed=good))
    return results


def installed(name: str) -> str | None:
    """The version of a package, under one of its names."""
    for each in (name, *OTHER_NAMES.get(name, ())):
        try:
            return metadata.version(each)
        except metadata.PackageNotFoundError:
            continue
    return None


def requirements() -> list[Requirement]:
    """What pyproject.toml asks for, or, away from the repository, what was written down at the installation."""
    try:
        lines = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        try:
            lines = [line for line in metadata.requires("braid") or [] if "extra ==" not in line]
        except metadata.PackageNotFoundError:
            lines = []
    found = []
    for line in lines:
        try:
            found.append(Requirement(line))
        except InvalidRequirement:
            continue
    return found


def _fits(requirement: Requirement, version: str) -> bool:
    try:
        return requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def _tested(node: Node) -> dict[str, str] | None:
    try:
        text = node.constraints.read_text()
    except OSError:
        return None
    lines = (re.fullmatch(r"\s*([A-Za-z0-9._-]+)\s*==\s*([^\s#;]+).*", line) for line in text.splitlines())
    return {match[1].lower(): match[2] for match in lines if match}


CHECKS = (
    Check(
        "packages",
        "versions of torch, triton, deepspeed, megatron-core and the rest against launch/constraints.txt",
        packages,
    ),
)
