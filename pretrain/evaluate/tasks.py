"""The names of tasks. Light: a wrong name is told before torch is imported."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence

from pretrain.exit import USAGE, Exit

TASKS = ("perplexity", "mqar", "needle")
HARNESS = "lm_eval:"
MISSING = "lm-evaluation-harness is not installed; get it with: pip install lm-eval   (or: pip install '.[evaluate]')"


def check_names(names: Sequence[str]) -> None:
    """Raises Exit for a name that is no task, with the nearest one, and when lm_eval is wanted but not installed."""
    valid = [*TASKS, f"{HARNESS}NAME"]
    for name in names:
        if name in TASKS or (name.startswith(HARNESS) and len(name) > len(HARNESS)):
            continue
        near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise Exit(f"unknown task {name!r}; {hint}valid tasks: {', '.join(valid)}", USAGE)
    if any(name.startswith(HARNESS) for name in names):
        require_harness()


def require_harness() -> None:
    """Raises Exit with the command that installs lm-evaluation-harness when it is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise Exit(MISSING, USAGE)
