"""Puts one value into a YAML file that people keep by hand: everything else, comments and order too, stays as it is."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import yaml


def write_key(path: Path, key: str, value: Any) -> str | None:
    """Sets a dotted key (`engine.bucket_bytes`) of a YAML file; its sections are made where they are missing.

    Returns what was there before, as text (None: nothing). Raises ValueError where the file is missing, is not a mapping, or is
    written in a way that cannot be edited safely (anchors, for example): then nothing is changed.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    try:
        new, before = with_key(text, key, value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    # Beside the file and then in its place: a job that starts now reads the old one or the new one.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(new)
        Path(name).chmod(path.stat().st_mode)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return before


def with_key(text: str, key: str, value: Any) -> tuple[str, str | None]:
    """(text with the key set, the text of its value before). See write_key."""
    by_hand = f"set it by hand: {key}: {_flow(value)}"
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        old = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
    if root is None:
        root, old = yaml.MappingNode("tag:yaml.org,2002:map", []), {}
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"expected sections such as `model:`; {by_hand}")
    parts = key.split(".")
    node, depth = root, 0
    entry = _entry(node, parts[0])
    while entry is not None and depth < len(parts) - 1 and isinstance(entry[1], yaml.MappingNode):
        node, depth = entry[1], depth + 1
        entry = _entry(node, parts[depth])
    before: str | None = None
    if entry is not None:
        # The value itself, or an empty section (`engine:` with nothing below) that becomes one.
        if depth < len(parts) - 1 and not _empty(entry[1]):
            raise ValueError(f"{'.'.join(parts[: depth + 1])} is no section with keys of its own; {by_hand}")
        found = text[entry[1].start_mark.index : _end(entry[1])]
        before = found if depth == len(parts) - 1 and found else None
        new = _replaced(text, entry, _flow(_nest(parts[depth + 1 :], value)))
    elif node.flow_style and node is not root:
        new = _into_flow(text, node, parts[depth], _nest(parts[depth + 1 :], value))
    else:
        new = _into_block(text, node, parts[depth:], value)
    _check(new, old, parts, value, by_hand)
    return new, before


def _entry(node: yaml.MappingNode, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    return next(((key, value) for key, value in node.value if key.value == name), None)


def _empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null")


def _end(node: yaml.Node) -> int:
    """Where the last character of a node is; marks of block collections lie behind the comments that follow."""
    if isinstance(node, yaml.MappingNode) and not node.flow_style and node.value:
        return _end(node.value[-1][1])
    if isinstance(node, yaml.SequenceNode) and not node.flow_style and node.value:
        return _end(node.value[-1])
    return int(node.end_mark.index)


def _replaced(text: str, entry: tuple[yaml.Node, yaml.Node], new: str) -> str:
    key, value = entry
    if _empty(value) and value.start_mark.index == value.end_mark.index:  # nothing stands there
        colon = text.index(":", key.end_mark.index) + 1
        return f"{text[:colon]} {new}{text[colon:]}"
    start = value.start_mark.index
    if isinstance(value, (yaml.MappingNode, yaml.SequenceNode)) and not value.flow_style:
        start = text.index(":", key.end_mark.index) + 1
        new = " " + new
    return text[:start] + new + text[_end(value) :]


def _into_flow(text: str, node: yaml.MappingNode, name: str, value: Any) -> str:
    end = node.end_mark.index - 1  # the brace
    body = text[node.start_mark.index + 1 : end].rstrip()
    comma = ", " if node.value and not body.endswith(",") else ""
    return text[: node.start_mark.index + 1] + body + comma + f"{name}: {_flow(value)}" + text[end:]


def _into_block(text: str, node: yaml.MappingNode, names: list[str], value: Any) -> str:
    column = node.value[0][0].start_mark.column if node.value else 0
    lines = [f"{' ' * (column + 2 * depth)}{name}:" for depth, name in enumerate(names)]
    lines[-1] += f" {_flow(value)}"
    at = _end(node) if node.value else len(text)
    line_end = text.find("\n", at)
    if line_end < 0:
        head, tail = text + ("\n" if text and not text.endswith("\n") else ""), ""
    else:
        head, tail = text[: line_end + 1], text[line_end + 1 :]
    return head + "\n".join(lines) + "\n" + tail


def _nest(names: list[str], value: Any) -> Any:
    for name in reversed(names):
        value = {name: value}
    return value


def _flow(value: Any) -> str:
    """On one line, but a list of mappings with a line each."""
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return "[\n" + ",\n".join(f"    {_flow(each)}" for each in value) + ",\n  ]"
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).strip()
    return text.removesuffix("\n...").strip()


def _check(new: str, old: Any, parts: list[str], value: Any, by_hand: str) -> None:
    """What the new text says is what the old one said, with the key set: the proof that the edit was right."""
    wanted = _set(old or {}, parts, value)
    try:
        said = yaml.safe_load(new)
    except yaml.YAMLError:
        said = None
    if said != wanted:
        raise ValueError(f"written in a way that cannot be edited safely; {by_hand}")


def _set(data: Any, parts: list[str], value: Any) -> Any:
    section = data if isinstance(data, dict) else {}
    inner = value if len(parts) == 1 else _set(section.get(parts[0]), parts[1:], value)
    return {**section, parts[0]: inner}
