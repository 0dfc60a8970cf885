"""Does this checkpoint belong to this configuration? Asked before anything is loaded.

Three classes of keys in the resolved configuration:
  the model        another model cannot load these tensors, or worse, it can: refused
  the data order   the run would see tokens twice or never, and could not be reproduced: refused unless named as
  intended everything else  learning rate, number of steps, layout of ranks, engine, logging, ...: changes freely
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

MODEL_KEYS = ("model.*",)
ORDER_KEYS = ("data.*", "train.batch", "train.seed")
# How the data is fetched or scored, not what is trained on and in which order. micro_batch is absent above for the same
# reason: it divides a step's sequences among ranks and moments.
# data.order is what a run begins with: its checkpoints say which version of the order they have.
FREE_KEYS = (
    "data.prefetch", "data.validation*", "data.sources.*.validation_path", "data.workers", "data.on_bad", "data.order",
)  # fmt: skip
# Where the data lies. If both sides know the corpus hash, the hash speaks and the place does not matter.
PLACE_KEYS = ("data.path", "data.tokenizer", "data.sources.*.path", "data.sources.*.name")
HASH_KEY = "data.hash"
ABSENT = "(absent)"


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration to dotted keys. Lists become `key.0`, `key.1`; an empty list or mapping stays as a value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, (list, tuple)) and value:
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, dotted + ".")
        else:
            flat[dotted] = [] if isinstance(value, tuple) else value  # JSON has no tuples
    return flat


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (saved, current) for every key that differs; ABSENT where one side lacks it."""
    old, new = flatten(saved), flatten(current)
    return {
        key: (old.get(key, ABSENT), new.get(key, ABSENT))
        for key in dict.fromkeys([*old, *new])
        if _unequal(old.get(key, ABSENT), new.get(key, ABSENT))
    }


def check_same_model(saved: Mapping[str, Any], current: Mapping[str, Any], allow: Iterable[str] = ()) -> list[str]:
    """Compare the configuration in a checkpoint with the one of this run; both nested, as written to meta.json.

    allow: dotted keys or patterns (`data.*`) in the data order that may differ, from `checkpoint.allow_changes`.
    Returns a line for each allowed difference, to be logged. Raises ValueError listing every refused one with both
    values and what to do. A difference in the model cannot be allowed.
    """
    changed = differences(saved, current)
    old, new = flatten(saved), flatten(current)
    same_corpus = old.get(HASH_KEY) is not None and old.get(HASH_KEY) == new.get(HASH_KEY)
    allow = tuple(allow)
    model: list[str] = []
    order: list[tuple[str, str]] = []
    allowed: list[tuple[str, str]] = []
    for key, (was, now) in changed.items():
        line = f"{key}: {was!s} in the checkpoint, {now!s} here"
        if _matches(key, MODEL_KEYS):
            model.append(line)
        elif (
            _matches(key, ORDER_KEYS)
            and not _matches(key, FREE_KEYS)
            and not (same_corpus and _matches(key, PLACE_KEYS))
        ):
            (allowed if _matches(key, allow) else order).append((key, line))
    parts = []
    if model:
        parts.append(_listing("The checkpoint holds another model:", model))
        parts.append("Undo the change, or start another run folder.")
    if order:
        parts.append(
            _listing("The checkpoint was written with another order of the data:", [line for _, line in order])
        )
        keys = ", ".join(key for key, _ in order)
        parts.append(
            f"Undo the change, start another run folder, or say that it is intended: checkpoint.allow_changes=[{keys}]"
        )
    if parts:
        raise ValueError("\n".join(parts))
    return [line for _, line in allowed]


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _unequal(a: Any, b: Any) -> bool:
    # 1 and True are equal to Python and not to a configuration; 1 and 1.0 are equal to both (JSON writes either).
    return a != b or isinstance(a, bool) != isinstance(b, bool)


def _listing(title: str, lines: list[str], limit: int = 20) -> str:
    more = [f"  and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join([title, *(f"  {line}" for line in lines[:limit]), *more])
