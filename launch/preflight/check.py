"""What a check is, and what it can answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from launch.preflight.node import Node

Status = Literal["pass", "warn", "fail", "not checked"]
STATUSES: tuple[Status, ...] = ("pass", "warn", "fail", "not checked")


@dataclass(frozen=True)
class Result:
    """One line of the table: what a check has found about one subject."""

    status: Status
    text: str
    """What was found, and unless it passed, why that matters or what to do."""
    subject: str = ""
    """The part of the node that this is about: "gpu 3", "eth0", a variable; empty for the node as a whole."""
    values: dict[str, Any] = field(default_factory=dict)
    """The numbers behind the text, for programs; what JSON can hold."""
    check: str = ""
    """The name of the check; filled in by whoever runs it."""


@dataclass(frozen=True)
class Check:
    """A question about the node."""

    name: str
    looks_at: str
    """One line for --list."""
    run: Callable[[Node], Sequence[Result]]
    """Returns at least one result."""


def passed(text: str, subject: str = "", **values: Any) -> Result:
    return Result("pass", text, subject, values)


def warned(text: str, subject: str = "", **values: Any) -> Result:
    return Result("warn", text, subject, values)


def failed(text: str, subject: str = "", **values: Any) -> Result:
    return Result("fail", text, subject, values)


def not_checked(why: str, subject: str = "", **values: Any) -> Result:
    return Result("not checked", why, subject, values)


def size(count: float) -> str:
    """Bytes for people: 8.0 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
