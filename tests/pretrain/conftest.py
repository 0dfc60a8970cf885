"""A small prepared corpus, made once for all tests of training: some of this repository's own sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.data.__main__ import main as data

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "prepared"
    inputs = [str(ROOT / "pretrain" / name / "*.py") for name in ("data", "train")]
    arguments = [part for pattern in inputs for part in ("--input", pattern)]
    assert (
        data(
            [
                "prepare",
                *arguments,
                "--output",
                str(folder),
                "--vocabulary",
                "512",
                "--validation",
                "0.03",  # every run ends with a pass over it
                "--document-bytes",
                "2048",
                "--workers",
                "1",
            ]
        )
        == 0
    )
    return folder
