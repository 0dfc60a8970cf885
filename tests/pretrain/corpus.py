"""The small corpus that tests train on: some of this repository's own sources."""

from __future__ import annotations

from pathlib import Path

from pretrain.data.__main__ import main as data

ROOT = Path(__file__).resolve().parents[2]


def prepare(folder: Path) -> Path:
    """Prepares the corpus in `folder`, which it returns."""
    inputs = [part for name in ("data", "train") for part in ("--input", str(ROOT / "pretrain" / name / "*.py"))]
    sizes = ["--vocabulary", "512", "--document-bytes", "2048", "--workers", "1"]
    # Few validation documents: every run ends with a pass over them.
    assert data(["prepare", *inputs, "--output", str(folder), *sizes, "--validation", "0.03"]) == 0
    return folder
