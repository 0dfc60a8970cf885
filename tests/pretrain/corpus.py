"""The small corpus that tests train on: some of this repository's own sources."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pretrain.data.__main__ import main as data

ROOT = Path(__file__).resolve().parents[2]
SIZE, PIECE = 256 * 1024, 256  # characters, in all and in a document


def prepare(folder: Path) -> Path:
    """Prepares the corpus in `folder`, which it returns.

    Every run ends with a pass over the validation split: some sixty sequences of 32 tokens. Which documents fall to it is
    their luck, so there are many small ones, and how many fall to it changes little when a source changes.
    """
    text = "".join(
        path.read_text() for name in ("data", "train") for path in sorted((ROOT / "pretrain" / name).glob("*.py"))
    )
    with tempfile.TemporaryDirectory(prefix="texts-") as texts:
        for start in range(0, min(SIZE, len(text)), PIECE):
            Path(texts, f"{start:07d}.txt").write_text(text[start : start + PIECE])
        arguments = ["--input", f"{texts}/*.txt", "--vocabulary", "512", "--workers", "1", "--validation", "0.025"]
        assert data(["prepare", *arguments, "--output", str(folder)]) == 0
    return folder
