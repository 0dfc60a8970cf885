"""One operator on one architecture: every representative request, then what the tuning table chooses for the same request
at other lengths and numbers of heads."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kernels
from kernels import tuning
from kernels.architecture import Architecture, facts
from kernels.dispatch import Form
from kernels.offline import figures as reader
from kernels.offline.choice import Declined, triton_chosen
from kernels.offline.figures import Figures
from kernels.offline.requests import Case, cases
from kernels.offline.trace import Launch, trace_call
from kernels.offline.verdict import Problem, problems
from kernels.tuning import Entry, Row


@dataclass
class Result:
    """One compiled kernel, or one thing that went wrong before there was a kernel."""

    arch: str
    op: str
    case: str
    kernel: str
    options: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    grid: tuple[int, ...] | None = None
    figures: Figures | None = None
    problems: list[Problem] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0


def operators() -> list[str]:
    """The operator folders in kernels/: those with an __init__ that names FORMS."""
    found = []
    for module in pkgutil.iter_modules(kernels.__path__):
        path = Path(next(iter(kernels.__path__))) / module.name / "__init__.py"
        if module.ispkg and path.exists() and "FORMS" in path.read_text():
            found.append(module.name)
    return found


def triton_forms(op: str) -> list[Form]:
    """The Triton forms that an operator names, also where it names several tuples of forms."""
    module = importlib.import_module(f"kernels.{op}")
    found: dict[tuple[str, str], Form] = {}
    for name, value in vars(module).items():
        if not name.endswith("FORMS"):
            continue
        groups = value.values() if isinstance(value, dict) else [value]
        for group in groups:
            for form in group if isinstance(group, tuple | list) else [group]:
                if isinstance(form, Form) and form.name == "triton":
                    found[(form.module, form.function)] = form
    return [form for form in found.values() if importlib.util.find_spec(form.module) is not None]


def sweep(op: str, arch_name: str) -> tuple[list[Result], set[str]]:
    """Compiles everything of one operator for one architecture, and judges it.

    Returns the results, and the names under which kernels asked for launch parameters.
    """
    arch = facts(arch_name)
    if not triton_forms(op):
        return [Result(arch_name, op, "", "", note="no Triton form")], set()
    requests = cases(op)
    if not requests:
        text = "has a Triton form but no representative requests: add them to kernels/offline/requests.py"
        return [Result(arch_name, op, "", "", problems=[("request", f"{op} {text}")])], set()
    results: list[Result] = []
    lookups: list[tuple[Case, str, dict[str, Any]]] = []
    seen: set[str] = set()
    for case in requests:
        with tuning.observe() as observed:
            results += _compile(case, arch, seen)
        lookups += [(case, kernel, keys) for kernel, keys, _ in observed]
    return results + _rows(arch, lookups, seen), {kernel for _, kernel, _ in lookups}


def _compile(case: Case, arch: Architecture, seen: set[str]) -> list[Result]:
    trouble: Result | None = None

    def call() -> None:
        nonlocal trouble
        try:
            with triton_chosen():
                case()
        except Declined as declined:
            trouble = Result(arch.name, case.op, case.name, "", note=f"declined: {declined}")
            if case.required:
                trouble.problems.append(("request", f"the Triton form declines: {declined}"))
        except Exception as error:
            trouble = Result(arch.name, case.op, case.name, "")
            trouble.problems.append(("request", f"the call failed: {type(error).__name__}: {error}"))

    launches = trace_call(arch, call).launches
    if trouble is None and not launches:
        trouble = Result(arch.name, case.op, case.name, "")
        trouble.problems.append(("request", "the call launched no kernel"))
    results = [judge(launch, arch, case.op, case.name) for launch in launches if _new(launch, seen)]
    return results + ([trouble] if trouble is not None else [])


def _new(launch: Launch, seen: set[str]) -> bool:
    """Whether this binary was not judged before, for another request."""
    if launch.compiled is None:
        return True
    known = launch.compiled.hash in seen
    seen.add(launch.compiled.hash)
    return not known


def judge(launch: Launch, arch: Architecture, op: str, case: str) -> Result:
    """The figures and faults of one compiled launch."""
    result = Result(arch.name, op, case, launch.kernel, dict(launch.options), dict(launch.constants), launch.grid)
    result.seconds = launch.seconds
    if launch.error is not None:
        result.problems.append(("compile", launch.error))
    elif launch.compiled is None:
        result.problems.append(("compile", "the compiler returned nothing"))
    if launch.compiled is None:
        return result
    try:
        result.figures = reader.read(launch.compiled, arch)
    except reader.Unreadable as missing:
        result.problems.append(("unreadable", f"cannot read {missing}"))
        return result
    except Exception as error:
        result.problems.append(("unreadable", f"reading the figures failed: {type(error).__name__}: {error}"))
        return result
    result.problems += problems(result.figures, arch)
    return result


def _rows(arch: Architecture, lookups: list[tuple[Case, str, dict[str, Any]]], seen: set[str]) -> list[Result]:
    """What the tuning table would choose for these requests at other lengths or numbers of heads.

    A row that serves no request at any length is a fault: nobody knows what it compiles to.
    """
    results: list[Result] = []
    asked = {kernel for _, kernel, _ in lookups}
    for kernel, entry in tuning.read(arch.name).items():
        if kernel not in asked:
            continue
        reached: list[Row | None] = []
        done: set[tuple[str, int]] = set()
        for case, name, keys in lookups:
            if name != kernel:
                continue
            usual = entry.best(keys)
            reached.append(usual)
            for row in _choices(entry, keys):
                if row is usual or (case.name, id(row)) in done:
                    continue
                done.add((case.name, id(row)))
                reached.append(row)
                label = "default" if row is None else f"row {entry.rows.index(row)}"
                use = {**entry.default, **({} if row is None else row.use)}
                with tuning.override({kernel: use}):
                    results += _compile(dataclasses.replace(case, name=f"{case.name}, {label}"), arch, seen)
        for number, row in enumerate(entry.rows):
            if not any(row is other for other in reached):
                text = f"row {number} of {kernel} in {arch.name}.json fits no representative request: {dict(row.when)}"
                results.append(Result(arch.name, "", "", kernel, problems=[("row", text)]))
    return results


VARYING = ("T", "heads")  # keys of which the requests show one value only, and models any


def _choices(entry: Entry, keys: Mapping[str, Any]) -> list[Row | None]:
    """The rows (None: the default) that are chosen for these keys when those in VARYING take any value."""
    values = []
    for name in VARYING:
        bounds = {int(value) for row in entry.rows for key, value in row.when.items() if key.rpartition("_")[0] == name}
        bounds |= {int(value) for row in entry.rows for key, value in row.when.items() if key == name}
        near = {value + step for value in bounds for step in (-1, 0, 1)} if name in keys else set()
        values.append([{name: value} for value in sorted(near)] or [{}])
    return [entry.best({**keys, **one, **other}) for one in values[0] for other in values[1]]


def unknown_kernels(arch_name: str, asked: set[str]) -> list[Result]:
    """Kernels in the tuning table that no request asked for: misspelt, or gone."""
    return [
        Result(arch_name, "", "", name, problems=[("row", f"{arch_name}.json has {name}, which no kernel asks for")])
        for name in sorted(set(tuning.read(arch_name)) - asked)
    ]
