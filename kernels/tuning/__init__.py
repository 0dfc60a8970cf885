"""Launch parameters of the Triton kernels: looked up, never searched at run time.

A kernel's author keeps the fallback next to the kernel, and asks for parameters at every launch:

    DEFAULTS = {"delta_rule_forward_state": {
        "generic": {"BLOCK_V": 32, "num_warps": 4, "num_stages": 1},  # for devices without a table, and the interpreter
    }}
    CANDIDATES = {"delta_rule_forward_state": [{"BLOCK_V": 32, "num_warps": 4}, ...]}  # what `bench --tune` may try

    use = parameters("delta_rule_forward_state", architecture(q.device), defaults=DEFAULTS, K=K, V=V, T=T, heads=B * H)
    _kernel[grid](..., **use)

What is known of an architecture stands in `<architecture>.json` in this folder, all of it, with what holds for
unknown devices in `generic.json`; read once per process, they win over DEFAULTS:

    {"delta_rule_forward_state": {
        "default": {"BLOCK_V": 32, "num_warps": 8, "num_stages": 2},
        "rows": [{"when": {"K": 128, "V": 128}, "use": {"BLOCK_V": 64}, "source": "offline: 8 warps spill"},
                 {"when": {"K": 128, "T_min": 8192}, "use": {"BLOCK_V": 128}, "measured": "ledger row 12"}]}}

"measured" names the measurement behind a row. Everything without it was chosen by the figures of the compilers alone
(`python -m kernels.check`): it fits, does not spill and uses the matrix units, and nobody has timed it. "source" may say
why such a row is there.

`when` names keys of the call: a plain name must be equal (numbers or strings), `X_min` and `X_max` bound key X, ends
included. A row applies when all its conditions hold. Layers, each laid over the one before: DEFAULTS generic,
generic.json, DEFAULTS of the architecture (if a kernel has any), <architecture>.json's default, the one most particular
row that applies. Most particular: most equalities, then most bounds, then the earlier one. A row with bounds only is thus a
bucket, a row with equalities exact.

Options that a backend does not know make Triton's JIT raise KeyError; they are removed here, so that one table may
hold both vendors' options. They are listed in AMD_ONLY and NVIDIA_ONLY.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.architecture import architecture, vendor

FOLDER = Path(__file__).parent
AMD_ONLY = frozenset({"waves_per_eu", "matrix_instr_nonkdim", "kpack", "schedule_hint"})
NVIDIA_ONLY = frozenset({"maxnreg", "num_ctas", "ptx_options"})

Defaults = Mapping[str, Mapping[str, Mapping[str, int]]]
Use = dict[str, int]


@dataclass(frozen=True)
class Row:
    """One line of a tuning file."""

    when: Mapping[str, int | str]
    use: Mapping[str, int]
    measured: str = ""  # which ledger row or command stands behind it; "" for a row that was only compiled
    source: str = ""  # why the row is there

    def applies(self, keys: Mapping[str, Any], *, bounds: bool = True) -> bool:
        """Whether all conditions hold for `keys`. bounds=False ignores X_min and X_max (to find a shape for a row)."""
        for name, wanted in self.when.items():
            base, _, end = name.rpartition("_")
            if end in ("min", "max") and base:
                if not bounds:
                    continue
                if base not in keys or (keys[base] < wanted if end == "min" else keys[base] > wanted):
                    return False
            elif name not in keys or keys[name] != wanted:
                return False
        return True

    @property
    def particularity(self) -> tuple[int, int]:
        bounds = sum(name.endswith(("_min", "_max")) for name in self.when)
        return len(self.when) - bounds, bounds


@dataclass(frozen=True)
class Entry:
    """What a tuning file says about one kernel."""

    default: Mapping[str, int]
    rows: tuple[Row, ...]

    def best(self, keys: Mapping[str, Any]) -> Row | None:
        fitting = [row for row in self.rows if row.applies(keys)]
        return max(fitting, key=lambda row: row.particularity) if fitting else None  # max keeps the earliest of equals


_overrides: dict[str, Mapping[str, int]] = {}
_lookups: list[tuple[str, dict[str, Any], Use]] | None = None
_answers: dict[tuple[Any, ...], Use] = {}


def parameters(kernel: str, arch: str | None = None, *, defaults: Defaults | None = None, **keys: Any) -> Use:
    """Constexprs and launch options of one launch, by name: pass them on with `**`.

    kernel: its name in DEFAULTS and the JSON files. arch: as returned by `kernels.architecture.architecture`; None
    is the current GPU. defaults: the table next to the kernel. keys: what rows may ask about (K, V, T, heads,
    dtype="bf16", ...). Deterministic: depends on nothing but the arguments and the files.
    Raises KeyError for a kernel that neither the files nor `defaults` know.
    """
    if arch is None:
        arch = architecture(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    key = (kernel, arch, tuple(sorted(keys.items())))
    use = _answers.get(key)
    if use is None:
        if len(_answers) > 4096:  # lengths of sequences are part of the key
            _answers.clear()
        use = _answers[key] = _look_up(kernel, arch, defaults, keys)
    if kernel in _overrides:
        use = supported({**use, **_overrides[kernel]}, arch)
    if _lookups is not None:
        _lookups.append((kernel, dict(keys), dict(use)))
    return dict(use)


def _look_up(kernel: str, arch: str, defaults: Defaults | None, keys: Mapping[str, Any]) -> Use:
    table = (defaults or {}).get(kernel, {})
    names = ["generic"] if arch == "generic" else ["generic", arch]
    use: Use = {}
    known = False
    for name in names:
        if name in table:
            known = True
            use.update(table[name])
        entry = read(name).get(kernel)
        if entry is not None:
            known = True
            use.update(entry.default)
            row = entry.best(keys)
            use.update(row.use if row is not None else {})
    if not known:
        raise KeyError(
            f"no launch parameters for kernel {kernel!r} on {arch}: give it a default row in "
            f"{FOLDER / (arch + '.json')}, or a 'generic' entry in the DEFAULTS table next to the kernel"
        )
    return supported(use, arch)


def supported(use: Mapping[str, int], arch: str) -> Use:
    """`use` without the options that the architecture's compiler does not know."""
    maker = vendor(arch)
    foreign: frozenset[str] = frozenset()
    if maker != "amd":
        foreign |= AMD_ONLY
    if maker != "nvidia":
        foreign |= NVIDIA_ONLY
    if arch == "gfx950":
        foreign |= {"kpack"}  # accepted there with a warning, and ignored
    return {name: value for name, value in use.items() if name not in foreign}


@functools.cache
def read(arch: str) -> dict[str, Entry]:
    """The tuning file of an architecture, empty when there is none.

    Raises ValueError for a file that does not have the documented form.
    """
    path = FOLDER / f"{arch}.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return {kernel: _entry(path, kernel, body) for kernel, body in content.items()}


def _entry(path: Path, kernel: str, body: Any) -> Entry:
    def use(value: Any, where: str) -> dict[str, int]:
        if not isinstance(value, dict) or not all(isinstance(number, int) for number in value.values()):
            raise ValueError(f"{path}: {kernel}, {where}: must be an object of integers, got {value!r}")
        return value

    if not isinstance(body, dict) or set(body) - {"default", "rows"}:
        raise ValueError(f"{path}: {kernel} must have the keys 'default' and 'rows' only, got {body!r}")
    rows = []
    for number, row in enumerate(body.get("rows", [])):
        where = f"row {number}"
        if (
            not isinstance(row, dict)
            or set(row) - {"when", "use", "measured", "source"}
            or not {"when", "use"} <= set(row)
        ):
            raise ValueError(
                f"{path}: {kernel}, {where}: needs 'when' and 'use' (and may have 'measured' and 'source'), got {row!r}"
            )
        when, notes = row["when"], {name: row.get(name, "") for name in ("measured", "source")}
        if not isinstance(when, dict) or not all(isinstance(value, int | str) for value in when.values()):
            raise ValueError(
                f"{path}: {kernel}, {where}: 'when' must be an object of numbers and strings, got {when!r}"
            )
        if not all(isinstance(note, str) for note in notes.values()):
            raise ValueError(f"{path}: {kernel}, {where}: 'measured' and 'source' must be text, got {notes!r}")
        rows.append(Row(when, use(row["use"], where), **notes))
    return Entry(use(body.get("default", {}), "default"), tuple(rows))


@contextlib.contextmanager
def override(changes: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
    """Within this context the named kernels use these parameters over the looked-up ones (tuning, checking)."""
    before = dict(_overrides)
    _overrides.update(changes)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


@contextlib.contextmanager
def observe() -> Iterator[list[tuple[str, dict[str, Any], Use]]]:
    """Collects (kernel, keys, parameters) of every lookup made within this context."""
    global _lookups
    before, _lookups = _lookups, []
    try:
        yield _lookups
    finally:
        _lookups = before


def forget() -> None:
    """Drops what was read, so that changed files count: for tests and after writing a file."""
    read.cache_clear()
    _answers.clear()
