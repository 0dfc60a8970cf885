"""One warm template for all tests of watchers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pretrain.watch.watched import Jobs, jobs


@pytest.fixture(scope="package")
def start() -> Iterator[Jobs]:
    with jobs() as started:
        yield started
