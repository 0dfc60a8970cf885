"""What every test shares: the import path, quiet single-threaded children, and the two opt-in kinds of test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = str(Path(__file__).resolve().parent.parent)
# First, so that `tests` is this folder and not a package of that name that somebody installed.
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from tests.ranks import QUIET  # noqa: E402

# Before torch is imported: thread pools are sized then. Explicit settings of the caller win.
for _key, _value in QUIET.items():
    os.environ.setdefault(_key, _value)
# The suite starts hundreds of Pythons. Where they may not keep bytecode, as in many containers, each compiles the project again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


# These take minutes each. Begun first, they do not leave one process busy when the others have nothing left to do.
LONGEST = (
    "tests/test_readme.py",
    "tests/faults/",
    "tests/launch/",
    "tests/pretrain/train/",
    "tests/parallel/test_mutations.py",
    "tests/parallel/test_deepspeed.py",
    "tests/pretrain/model/test_families.py",
    "tests/pretrain/test_main.py",
    "tests/pretrain/test_equivalence.py",
    "tests/pretrain/test_verify_resume.py",
    "tests/pretrain/watch/",
    "tests/parallel/",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign", action="store_true", help="also run the tests marked campaign (long)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(
            key=lambda item: next((i for i, name in enumerate(LONGEST) if item.nodeid.startswith(name)), len(LONGEST))
        )
    if not config.getoption("--campaign"):
        for item in items:
            if item.get_closest_marker("campaign"):
                item.add_marker(pytest.mark.skip(reason="campaign: runs with --campaign"))
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in needs_gpu:
                item.add_marker(pytest.mark.skip(reason="gpu: no CUDA or ROCm device here"))


@pytest.fixture(autouse=True)
def the_process_as_it_was() -> Iterator[None]:
    """A run settles denormal numbers and products for its process (pretrain/host.py), which may go on with other tests."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
        sys.modules["torch"].set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small corpus (tests/pretrain/corpus.py), made once for all tests of training."""
    from tests.pretrain.corpus import prepare

    return prepare(tmp_path_factory.mktemp("corpus") / "prepared")
