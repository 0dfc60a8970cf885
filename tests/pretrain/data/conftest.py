"""A small real corpus (parts of the Python standard library and one file of nasty text), prepared once."""

from __future__ import annotations

import email
import http
import json
import logging
import shutil
from pathlib import Path

import pytest

from pretrain.data.prepare import PrepareOptions, prepare
from tests.pretrain.data.texts import NASTY

SEED = 3
VALIDATION = 0.2


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some forty files, about half a megabyte."""
    folder = tmp_path_factory.mktemp("text")
    for package in (json, email, http, logging):
        assert package.__file__ is not None
        source = Path(package.__file__).parent
        for path in sorted(source.glob("*.py")):
            shutil.copyfile(path, folder / f"{source.name}_{path.name}")
    (folder / "nasty.txt").write_bytes("\n".join(NASTY).encode())
    return folder


@pytest.fixture(scope="session")
def prepared(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `prepare` writes from `text_folder`; read only."""
    output = tmp_path_factory.mktemp("prepared") / "corpus"
    options = PrepareOptions(
        [f"{text_folder}/*"], output, vocabulary=512, validation=VALIDATION, seed=SEED, workers=1, document_bytes=0
    )
    prepare(options)
    return output


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(prepared, tmp_path / "copied"))
