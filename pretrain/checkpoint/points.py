"""Named points in a save, so that tests can end, slow or fail a job exactly there.

Nothing happens at a point unless `observer` is set, and only tests set it. In the order in which a save passes them:
reserved, writing (each rank, before each file), written (each rank), manifest, renamed, published, pruning.
"""

from __future__ import annotations

from collections.abc import Callable

observer: Callable[[str], None] | None = None


def reached(point: str) -> None:
    """Tell the observer, if there is one, that the save has come to `point`."""
    if observer is not None:
        observer(point)
