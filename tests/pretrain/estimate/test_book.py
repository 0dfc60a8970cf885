"""Traces that are kept in a file: the same costs without tracing, and never those of something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kernels.dispatch import VARIABLE
from pretrain.estimate import book as books
from pretrain.estimate import model as counted
from pretrain.estimate.book import Book
from pretrain.estimate.layout import rank_costs
from pretrain.estimate.model import ModelCosts
from tests.pretrain.estimate.settings import config

RUN = config("zaya", train={"device": "cuda", "recompute": "selective"}, mesh={"tp": 2})


def costs(book: Book | None, run: Any = RUN) -> Any:
    return rank_costs(ModelCosts.of(run, book), run, run.mesh.grid(run.mesh.tp))


def test_what_was_traced_is_not_traced_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Book.of(RUN.model, tmp_path)
    plain = costs(book)
    assert len(book.traces) == 2  # the first layer's router has no state to take in
    book.close()
    assert [path.name for path in tmp_path.iterdir()] == [book.path.name]

    def trace(*_: Any) -> Any:
        raise AssertionError("traced")

    monkeypatch.setattr(counted, "trace", trace)
    again = Book.of(RUN.model, tmp_path)
    assert again.traces == book.traces and costs(again) == plain
    assert not again.changed
    with pytest.raises(AssertionError, match="traced"):
        costs(None)
    with pytest.raises(AssertionError, match="traced"):  # another way to run the same layers
        costs(again, config("zaya", train={"device": "cuda", "recompute": "full"}, mesh={"tp": 2}))


def test_a_cpu_s_traces_are_not_kept(tmp_path: Path) -> None:
    run = config("gla")
    book = Book.of(run.model, tmp_path / "none")
    costs(book, run)
    book.close()
    assert not book.traces and not book.path.parent.exists()


def test_a_file_that_is_none_is_written_anew(tmp_path: Path) -> None:
    book = Book.of(RUN.model, tmp_path)
    for text in ("", "{", '{"a": 1}', '{"a": {"both": [{"inner": 1}, {}]}}', "[]"):
        book.path.write_text(text)
        assert Book.of(RUN.model, tmp_path).traces == {}
    broken = Book.of(RUN.model, tmp_path)
    plain = costs(broken)
    broken.close()
    assert costs(Book.of(RUN.model, tmp_path)) == plain


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    book = Book.of(RUN.model, tmp_path / "file" / "below")
    costs(book)
    book.close()
    assert book.changed


def test_other_models_code_and_settings_have_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(model: str = "gla") -> str:
        return Book.of(config(model).model, tmp_path).path.name

    names = [name(), name("mamba")]
    monkeypatch.setenv(VARIABLE, "reference")
    names.append(name())
    monkeypatch.delenv(VARIABLE)
    assert name() == names[0]
    for floor in books.FLOORS:
        (tmp_path / floor).mkdir()
    monkeypatch.setattr(books, "ROOT", tmp_path)
    names.append(name())
    source = tmp_path / "kernels" / "one.py"
    for text in ("1", "2"):
        source.write_text(text)
        names.append(name())
    assert len(set(names)) == 6
