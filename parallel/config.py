"""The base class of every configuration section: strict, and helpful about keys that do not exist."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Strict(BaseModel):
    """A configuration section.

    An unknown key is an error that names the nearest valid one; assignments are checked like construction.
    """

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, validate_default=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, data: Any) -> Any:
        # Checked here and not left to extra="forbid", because only the section itself knows which keys come near.
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise unknown_key(str(key), sorted(cls.model_fields))
        return data


def unknown_key(key: str, valid: list[str]) -> PydanticCustomError:
    """The error for a key that does not exist, with the nearest valid one if any is near."""
    context = {"key": key, "guess": guess(key, valid), "valid": ", ".join(valid)}
    return PydanticCustomError("unknown_key", "unknown key; {guess}valid keys: {valid}", context)


def guess(name: str, valid: list[str]) -> str:
    """`did you mean 'x'? `, or nothing when no valid name is near."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""
