"""The base class of every configuration section: strict, immutable in spirit, and without defaults that surprise."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A configuration section. An unknown key is an error; assignments are checked like construction."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, validate_default=True, use_attribute_docstrings=True)
