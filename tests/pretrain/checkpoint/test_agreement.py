"""The ranks' agreement is formed within the job's own time, or not at all."""

from __future__ import annotations

import os
import signal
from datetime import timedelta

import torch

from pretrain.checkpoint.agreement import DISK, Agreement
from tests.ranks import Died, run_ranks


def formed(rank: int, world: int, victim: int | None, patience: float) -> tuple[str, float]:
    """What happened, and the seconds that its later collectives may take."""
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        agreement = Agreement(timeout=timedelta(seconds=patience))
    except RuntimeError as error:
        return str(error), 0.0
    assert agreement.group is not None
    options = agreement.group._get_backend(torch.device("cpu")).options
    return agreement.decide("asking", lambda: "formed"), options._timeout.total_seconds()


def test_a_rank_that_dies_before_it_is_not_waited_for_longer_than_the_job_allows() -> None:
    # torch waits half an hour for every group of which no time is said, whatever the job's own group was given.
    (text, _), died = run_ranks(formed, 2, 1, 3.0, may_die=(1,), timeout=60)
    assert isinstance(died, Died)
    assert "timed out" in text.lower() or "timeout" in text.lower(), text


def test_what_it_decides_later_may_take_as_long_as_a_disk() -> None:
    assert run_ranks(formed, 2, None, 60.0) == [("formed", DISK.total_seconds())] * 2
