"""What to do after torchrun has ended. Pure functions of what happened."""

from __future__ import annotations

import random
from typing import Literal, NamedTuple

from launch.outcome import Outcome
from pretrain import exit as codes

# Starting again cannot help, or must not be done unseen.
FINAL = {
    codes.USAGE: "bad usage or configuration",
    codes.BAD_DATA: "corrupt or missing data",
    codes.NO_CHECKPOINT: "no loadable checkpoint",
    codes.NUMERICAL: "persistent numerical fault",
}


class Policy(NamedTuple):
    max_restarts: int = 5  # in a row without a newer checkpoint
    wait: float = 5.0  # seconds before the first of them; each next waits twice as long
    max_wait: float = 300.0
    seed: str = "0"
    restart_preempted: bool = False
    exclude_after: int = 3


class Decision(NamedTuple):
    """action: restart after `wait` seconds; stop the job with `code`; or leave it to the other hosts, ending here with `code`."""

    action: Literal["restart", "stop", "leave"]
    code: int
    why: str
    wait: float = 0.0
    gave_up: bool = False  # after too many crashes, here; other hosts may fare better


def decide(outcome: Outcome, asked: str | None, restarts: int, newest: str | None, policy: Policy) -> Decision:
    """After the end of a launch.

    asked: the signal by which this supervisor was told to stop. restarts: in a row so far, without a newer checkpoint than
    `newest` (the name of one, or None when there is none yet).
    """
    code = outcome.code
    if code == codes.FINISHED:
        return Decision("stop", code, "finished")
    if code in FINAL:
        return Decision("stop", code, f"{FINAL[code]}; {outcome.text()}")
    if asked is not None:
        # Even when the last save failed: in the queue, the job goes on from its newest checkpoint.
        why = f"stopped by {asked}" if code == codes.PREEMPTED else f"stopped by {asked}, not cleanly: {outcome.text()}"
        return Decision("stop", codes.PREEMPTED, why)
    if code == codes.PREEMPTED and not policy.restart_preempted:
        return Decision("stop", code, "preempted")
    if restarts >= policy.max_restarts:
        since = f"since {newest}" if newest else "and no checkpoint yet"
        why = f"gave up after {restarts} restart(s) in a row {since}; {outcome.text()}"
        return Decision("stop", code, why, gave_up=True)
    return Decision("restart", code, outcome.text(), waiting(restarts, policy))


def waiting(restarts: int, policy: Policy) -> float:
    """Seconds before the next start: doubled with each restart in a row, capped, then shortened by up to half.

    By the seed, so that jobs that fell together do not rise together, while all hosts of one job wait equally long.
    """
    full = min(policy.max_wait, policy.wait * 2.0 ** min(restarts, 60))
    return round(full * random.Random(f"{policy.seed} {restarts}").uniform(0.5, 1.0), 3)
