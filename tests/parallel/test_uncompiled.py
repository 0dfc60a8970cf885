"""Importing a module whose functions would be compiled."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from parallel.engines.uncompiled import import_uncompiled

MODULE = """
import torch

@torch.compile
def bare():
    return 1

@torch.compile(dynamic=False)
def with_options():
    return 2
"""


def test_decorated_functions_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_decorated_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    before = torch.compile
    import_uncompiled("a_decorated_module")
    module = importlib.import_module("a_decorated_module")
    for function, answer in ((module.bare, 1), (module.with_options, 2)):
        assert type(function) is type(lambda: None) and function.__module__ == "a_decorated_module"
        assert not hasattr(function, "_torchdynamo_orig_callable") and function() == answer
    assert torch.compile is before


def test_a_module_that_is_not_there_is_not_missed() -> None:
    import_uncompiled("no_such_module.anywhere")
    assert torch.compile.__name__ == "compile"
