"""The small corpus, made once for all tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pretrain.corpus import prepare


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("corpus") / "prepared")
