from __future__ import annotations

import pickle
import sys

import pytest

from pretrain.data import filters
from pretrain.data.errors import UsageError
from pretrain.data.filters import Filters

SENTENCES = {
    "en": "The committee will meet again on Thursday to discuss the budget.",
    "de": "Der Ausschuss trifft sich am Donnerstag erneut, um den Haushalt zu besprechen.",
    "fr": "La commission se réunira de nouveau jeudi pour discuter du budget.",
    "ru": "Комитет снова соберется в четверг, чтобы обсудить бюджет.",
    "zh": "委员会将于周四再次开会讨论预算。",
}


def test_nothing_is_left_out_by_default() -> None:
    plain = Filters()
    assert [plain.reject(text) for text in ("", "x" * 10_000, *SENTENCES.values())] == [None] * 7
    assert not plain.active
    assert plain.settings() == {}


def test_length_in_characters() -> None:
    both = Filters(min_length=3, max_length=5)
    assert [both.reject("é" * size) for size in range(1, 8)] == ["too_short"] * 2 + [None] * 3 + ["too_long"] * 2
    assert both.active
    assert both.settings() == {"min_length": 3, "max_length": 5}
    assert Filters(min_length=3).reject("x" * 1_000_000) is None
    assert Filters(max_length=5).reject("") is None


@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        ("en", None),
        ("EN-gb", None),
        ("en_Latn", None),
        ("__label__de", None),
        (" de ", None),
        ("zh-Hant", None),
        ("zh-Hans", "language"),
        ("zh", "language"),
        ("eng", "language"),
        ("fr", "language"),
        ("", "language"),
        (None, "language"),
    ],
)
def test_language_of_the_row(tag: str | None, reason: str | None) -> None:
    chosen = Filters.of(language="en, de,zh_Hant", language_field="lang")
    assert chosen.language == ("en", "de", "zh-hant")
    assert chosen.reject(SENTENCES["fr"], tag) == reason


def test_length_comes_before_language() -> None:
    assert Filters(min_length=10, language=("en",), language_field="lang").reject("short", "fr") == "too_short"


def test_settings_and_other_processes() -> None:
    chosen = Filters(language=("en",), language_field="lang", min_length=2)
    assert chosen.settings() == {"min_length": 2, "language": ["en"], "language_field": "lang"}
    assert pickle.loads(pickle.dumps(chosen)) == chosen
    assert Filters(**chosen.settings()) == chosen


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_length": 0}, r"--min-length: Input should be greater than or equal to 1"),
        ({"min_length": 9, "max_length": 8}, r"--min-length 9 is more than --max-length 8: nothing is left"),
        ({"language": "en,,de"}, r"--language: 'en,,de' is no list of languages; pass codes such as en,de"),
        ({"language_field": "lang"}, r"--language-field lang needs --language"),
        (
            {"language": ["en"], "language_confidence": 2.0},
            r"--language-confidence: Input should be less than or equal",
        ),
    ],
)
def test_wrong_settings(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Filters.of(**values)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    filters._detector.cache_clear()
    with pytest.raises(ValueError, match=r"needs the py3langid package: pip install 'braid\[clean\]'"):
        Filters(language=("en",)).check()
    Filters(language=("en",), language_field="lang").check()


def test_language_of_the_text() -> None:
    pytest.importorskip("py3langid")
    filters._detector.cache_clear()
    for kept in (("en",), ("de", "fr"), ("ru", "zh")):
        chosen = Filters(language=kept)
        chosen.check()
        found = {code: chosen.reject(text) for code, text in SENTENCES.items()}
        assert found == {code: None if code in kept else "language" for code in SENTENCES}
    english = Filters(language=("en",))
    assert english.reject("   \n" * 900 + SENTENCES["en"]) is None
    assert english.reject("12345 678") == "language"
    # A tag counts for nothing where no field was named.
    assert english.reject(SENTENCES["fr"], "en") == "language"
    assert Filters(language=("en",), language_confidence=0.999).reject(SENTENCES["en"]) == "language"
    assert set(english.settings()) == {"language", "language_confidence", "py3langid"}
    with pytest.raises(ValueError, match=r"--language xx, qq: not known to py3langid, which tells .*\bde\b"):
        Filters(language=("en", "xx", "qq")).check()
