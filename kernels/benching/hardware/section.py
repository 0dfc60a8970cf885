"""Puts the measured ceilings into a hardware file: its section `measured:`, and nothing else, is written.

The file's text is edited, not its parsed content, so that comments, order and line ends stay as they are.
"""

from __future__ import annotations

import json
import os
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.benching.hardware.matmul import Product
from kernels.benching.hardware.plateau import Ceiling

WIDTH = 120
KEY = "measured"


def check(path: Path, device: str, gpu: bool, dtypes: Sequence[str]) -> None:
    """Raises ValueError before anything is measured, if the results could not be written there, or do not belong there."""
    if not path.parent.is_dir():
        raise ValueError(f"--write {path}: there is no folder {path.parent}")
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--write {path}: a hardware file is named .yaml")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--write {path}: not allowed to write there")
    if not path.exists():
        missing = {"bf16", "fp32"} - set(dtypes)
        if missing:
            raise ValueError(
                f"--write {path}: a new file needs bf16 and fp32; add {', '.join(sorted(missing))} to --dtypes"
            )
        return
    content = _parse(_read(path), path)
    names = content.get("match") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"--write {path}: its `match` is not a list of names")
    if names:
        fits, chips = any(name.lower() in device.lower() for name in names), ", ".join(names)
    else:  # a CPU's, which is found by nobody: told apart by what was measured before
        before = content.get(KEY)
        chips = str(before.get("device")) if isinstance(before, dict) else str(content["name"]) if gpu else device
        fits = chips == device
    if not fits:
        raise ValueError(
            f"--write {path}: that file is of {chips}, and this is {device}; name another file, or a new one"
        )


@dataclass(frozen=True)
class Results:
    """What a section says.

    facts: date, device, threads (None for a GPU), torch, commit. memory: GB/s by pattern; past_caches: whether arrays were
    large enough for that. memory_bytes: of the device, for a new file.
    """

    facts: Mapping[str, Any]
    memory: Mapping[str, float]
    past_caches: bool
    ceilings: Mapping[str, Ceiling]
    products: Sequence[Product]
    gpu: bool
    memory_bytes: int


def write(path: Path, results: Results) -> str:
    """Writes the section, into a new file if there is none, and returns what was done, in words.

    Atomic: a reader sees the old file or the new one. Raises ValueError where the file cannot have it, and OSError.
    """
    section = render(results)
    path = path.resolve()  # a link stays a link
    if path.exists():
        before = _read(path)
        text = replaced(before, section, path)
        old, new = _parse(before, path), _parse(text, path)
        new.pop(KEY), old.pop(KEY, None)
        assert old == new, "everything else must stay as it is"
        done = f"wrote the section `{KEY}:` of {path}{_shares(old, results)}"
    else:
        text = _new(results) + section
        _parse(text, path)
        done = f"wrote {path}: a new file, whose nominal figures are the measured ones until you put in those of the datasheet"
    _replace(path, text)
    return done


def _shares(content: Mapping[str, Any], results: Results) -> str:
    """How much of the datasheet's figures was reached, where the file has them."""
    measured = {dtype: c.tflops for dtype, c in results.ceilings.items()} | {"memory": max(results.memory.values())}
    keys = {"bf16": "bf16_tflops", "fp32": "fp32_tflops", "memory": "memory_bandwidth_gbs"}
    shares = [
        f"{name} {measured[name] / content[key]:.0%}"
        for name, key in keys.items()
        if name in measured and isinstance(content.get(key), (int, float)) and content[key] > 0
    ]
    return f"; of its nominal figures: {', '.join(shares)}" if shares else ""


def render(results: Results) -> str:
    """The section's text."""
    lines = [f"{KEY}:  # written by `python -m kernels.bench hardware --write`, which replaces this section as a whole"]
    lines += [
        f"  {name}: {value if name == 'date' else json.dumps(value)}"
        for name, value in results.facts.items()
        if value is not None
    ]
    past = "past the caches" if results.past_caches else "partly from the caches: larger arrays were not measured"
    lines.append(f"  memory_gbs: {_flow({op: _round(value) for op, value in results.memory.items()})}  # {past}")
    lines.append(f"  matmul_tflops: {_flow({dtype: _round(c.tflops) for dtype, c in results.ceilings.items()})}")
    plateau = {dtype: _round(c.first_gflop) for dtype, c in results.ceilings.items()}
    lines.append(f"  plateau_gflop: {_flow(plateau)}  # smallest product, 2MNK, that reaches 90 % of that")
    rows: dict[tuple[int, int, int, str, str], Product] = {}
    for row in results.products:
        key = (*row.size, row.dtype, row.layout)
        if row.valid and (key not in rows or rows[key].tflops < row.tflops):  # of several libraries, the faster one
            rows[key] = row
    if rows:
        cells = [f"[{r.m}, {r.n}, {r.k}, {r.dtype}, {r.layout}, {_round(r.tflops):g}]," for r in rows.values()]
        lines.append("  matmul: [  # m, n, k, dtype, layout, TFLOP/s")
        # Spaces within a row are kept from being broken at.
        text = " ".join(cell.replace(" ", "\0") for cell in cells)
        lines += [f"    {line}".replace("\0", " ") for line in textwrap.wrap(text, WIDTH - 4)]
        lines.append("  ]")
    return "\n".join(lines) + "\n"


def replaced(text: str, section: str, path: Path) -> str:
    """`text` with its section replaced, or appended where it had none. Comments before and after the section stay."""
    import yaml

    end = "\r\n" if "\r\n" in text else "\n"
    lines = text.splitlines(keepends=True)
    node = yaml.compose(text)
    assert isinstance(node, yaml.MappingNode), "it has been parsed before"
    entries = [(k, v) for k, v in node.value if k.value == KEY]
    new = section.replace("\n", end)
    if not entries:
        if lines and not lines[-1].endswith("\n"):
            lines[-1] += end
        return "".join(lines) + (end if lines and lines[-1].strip() else "") + new
    key, value = entries[0]
    if key.start_mark.column or node.flow_style:
        raise ValueError(
            f"{path}: the section `{KEY}:` does not begin a line; write the file as one `key: value` a line"
        )
    first, last = key.start_mark.line, value.end_mark.line + (value.end_mark.column > 0)
    # A block's end is where the next key begins: what lies between belongs to that.
    while last > first + 1 and (not lines[last - 1].strip() or lines[last - 1].startswith("#")):
        last -= 1
    return "".join(lines[:first]) + new + "".join(lines[max(last, first + 1) :])


def _new(results: Results) -> str:
    missing = [dtype for dtype in ("bf16", "fp32") if dtype not in results.ceilings]
    if missing:
        raise ValueError(f"a new file needs bf16 and fp32, and no product in {' or '.join(missing)} ran")
    device = json.dumps(results.facts["device"])
    return (
        f"# {results.facts['device']}, as measured: no figure here is from a datasheet.\n"
        f"name: {device}\n"
        f"match: [{device if results.gpu else ''}]\n"
        f"bf16_tflops: {_round(results.ceilings['bf16'].tflops):g}\n"
        f"fp32_tflops: {_round(results.ceilings['fp32'].tflops):g}\n"
        f"memory_gib: {_round(results.memory_bytes / 2**30):g}\n"
        f"memory_bandwidth_gbs: {_round(max(results.memory.values())):g}\n\n"
    )


def _round(value: float) -> float:
    """Four digits: more than repeats."""
    return float(f"{value:.4g}")


def _flow(values: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {value:g}" for name, value in values.items()) + "}"


def _read(path: Path) -> str:
    with path.open(newline="") as file:  # keeps \r\n
        return file.read()


def _parse(text: str, path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or "name" not in content:
        raise ValueError(
            f"{path} is not a hardware file: it has no `name:`; those of configs/hardware/ show how one looks"
        )
    return content


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        mode = path.stat().st_mode if path.exists() else 0o666 & ~_umask()
        Path(temporary).chmod(mode & 0o7777)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
