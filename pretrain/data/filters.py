"""Which documents stay: by length and by language. Each decision depends on the document alone."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from parallel.config import Strict
from pretrain.data.errors import UsageError

# Characters that the detector looks at: enough to tell a language by, for a third of a millisecond a document.
_SAMPLE = 1000
_PACKAGE = "py3langid"


class Filters(Strict):
    """What `prepare` leaves out besides duplicates. Without a value, a setting leaves nothing out."""

    min_length: int | None = Field(None, ge=1)
    """Fewest characters of a document that stays."""
    max_length: int | None = Field(None, ge=1)
    """Most characters of a document that stays."""
    language: tuple[str, ...] = ()
    """Languages that stay, such as en: two-letter codes of ISO 639-1 for the detector, any tag for `language_field`."""
    language_field: str | None = None
    """Field of jsonl and parquet rows that holds the language; without it the text is looked at, which needs py3langid."""
    language_confidence: float = Field(0.5, ge=0, le=1)
    """The detector's least confidence in one of the languages; a document below it is left out."""

    @staticmethod
    def of(**values: Any) -> Filters:
        """Filters with these settings. Raises UsageError (a ValueError) that names the option at fault."""
        try:
            return Filters(**values)
        except ValidationError as error:
            first = error.errors()[0]
            option = "--" + str(first["loc"][0]).replace("_", "-") + ": " if first["loc"] else ""
            raise UsageError(f"{option}{first['msg'].removeprefix('Value error, ')}") from None

    @field_validator("language", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """A text is a list with commas; tags are compared in lower case."""
        if value is None:
            return ()
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) and part.strip() for part in parts):
            raise ValueError(f"{value!r} is no list of languages; pass codes such as en,de")
        return tuple(dict.fromkeys(_tag(part) for part in parts))

    @model_validator(mode="after")
    def _fits(self) -> Filters:
        if self.min_length is not None and self.max_length is not None and self.min_length > self.max_length:
            raise ValueError(
                f"--min-length {self.min_length} is more than --max-length {self.max_length}: nothing is left"
            )
        if self.language_field is not None and not self.language:
            raise ValueError(f"--language-field {self.language_field} needs --language, the languages that stay")
        return self

    @property
    def active(self) -> bool:
        """Whether any document can be left out."""
        return self.min_length is not None or self.max_length is not None or bool(self.language)

    @property
    def detects(self) -> bool:
        """Whether texts are looked at to tell their language."""
        return bool(self.language) and self.language_field is None

    def check(self) -> None:
        """Raises UsageError if the languages cannot be told: the package is missing, or does not know one of them."""
        if self.detects:
            known = set(_detector().labels)
            strange = [code for code in self.language if code not in known]
            if strange:
                raise UsageError(
                    f"--language {', '.join(strange)}: not known to {_PACKAGE}, which tells {', '.join(sorted(known))}; "
                    f"pass one of these, or name the field of the rows that holds the language as --language-field"
                )

    def settings(self) -> dict[str, Any]:
        """What is set, plain values, and the version of the detector if it is asked: equal settings, equal decisions."""
        found = {key: value for key, value in self.model_dump(mode="json").items() if value not in (None, [])}
        if self.detects:
            return {**found, _PACKAGE: importlib.metadata.version(_PACKAGE)}
        del found["language_confidence"]
        return found

    def reject(self, text: str, tag: str | None = None) -> str | None:
        """Why a document is left out ("too_short", "too_long", "language"), None if it stays.

        tag: what the row holds in `language_field`, where there is one; a row without it is left out. "en" stays with
        "en-GB" and "en_Latn", and with "__label__en". Raises UsageError if py3langid is needed and missing.
        """
        if self.min_length is not None and len(text) < self.min_length:
            return "too_short"
        if self.max_length is not None and len(text) > self.max_length:
            return "too_long"
        if self.language and not self._spoken(text, tag):
            return "language"
        return None

    def _spoken(self, text: str, tag: str | None) -> bool:
        if self.language_field is not None:
            whole = _tag(tag or "")
            return whole in self.language or whole.split("-")[0] in self.language
        found, confidence = _detector().classify(text[: 4 * _SAMPLE].strip()[:_SAMPLE])
        return found in self.language and confidence >= self.language_confidence


def _tag(written: str) -> str:
    return written.strip().lower().removeprefix("__label__").replace("_", "-")


@cache
def _detector() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UsageError(
            f"--language without --language-field needs the {_PACKAGE} package: pip install 'braid[clean]'"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
