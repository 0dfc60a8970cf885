"""How ranks decide together: one rank's answer, or one rank's error, becomes everybody's.

A file that one rank sees and another does not (network filesystems do that) must never send the two down different
paths, and an error on one rank must not leave the others waiting in the next collective. So every step of a save or a
load runs inside one of the two calls below.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.distributed_c10d import _set_pg_timeout

from pretrain.checkpoint.errors import CheckpointError, LeaseHeld, NoLoadableCheckpoint

T = TypeVar("T")
DISK = timedelta(minutes=30)  # for which ranks wait while another one writes

# Errors whose type tells the caller what to do; they cross ranks as themselves. All others become CheckpointError.
_KINDS: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    "NoLoadableCheckpoint": NoLoadableCheckpoint,
    "CheckpointError": CheckpointError,
    "LeaseHeld": LeaseHeld,
}


class Agreement:
    """The ranks of one process group; without torch.distributed, one process that agrees with itself.

    group: a process group that can carry Python objects from host memory (gloo). None: a new gloo group over all ranks
    is made, which is a collective call. It is apart from the training group on purpose: a save that runs beside
    training must never meet a training collective. timeout: how long to wait for the others then. What the group does later
    waits for disks, and has half an hour.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: timedelta = DISK) -> None:
        self.distributed = dist.is_available() and dist.is_initialized()
        if self.distributed and group is None:
            group = dist.new_group(backend="gloo", timeout=timeout)
            _set_pg_timeout(DISK, group)
        self.group = group
        self.rank = dist.get_rank(group) if self.distributed else 0
        self.world = dist.get_world_size(group) if self.distributed else 1

    @property
    def coordinator(self) -> bool:
        return self.rank == 0

    def decide(self, doing: str, function: Callable[[], T]) -> T:
        """Run `function` on the coordinator; return its result on every rank, or raise its error on every rank."""
        outcome = _attempt(function) if self.coordinator else None
        if self.distributed:
            box = [outcome]
            dist.broadcast_object_list(box, group=self.group, group_src=0)
            outcome = box[0] if outcome is None else outcome  # the coordinator's own one still knows its cause
        assert outcome is not None
        if isinstance(outcome, _Failure):
            text = f"{doing}: {outcome.text}" if outcome.kind == "CheckpointError" else outcome.text
            raise _KINDS[outcome.kind](text) from outcome.cause
        return outcome.value

    def everyone(self, doing: str, function: Callable[[], T]) -> list[T]:
        """Run `function` on every rank. Returns the results by rank on the coordinator, [] elsewhere.

        If it failed anywhere, every rank raises: what all failures are, if they are of one kind, else CheckpointError.
        """
        outcome = _attempt(function)
        outcomes: list[_Success[T] | _Failure] = [outcome]
        if self.distributed:
            gathered: list[Any] | None = [None] * self.world if self.coordinator else None
            dist.gather_object(outcome, gathered, group=self.group, group_dst=0)
            outcomes = gathered or []

        def verdict() -> None:
            failures = {rank: each for rank, each in enumerate(outcomes) if isinstance(each, _Failure)}
            if not failures:
                return
            kinds = {failure.kind for failure in failures.values()}
            ranks_of: dict[str, list[int]] = {}  # the same text from many ranks is said once
            for rank, failure in failures.items():
                ranks_of.setdefault(failure.text, []).append(rank)
            # What all ranks say alike needs no names.
            texts = [
                text if len(ranks) == self.world else f"rank {_span(ranks)}: {text}" for text, ranks in ranks_of.items()
            ]
            kind = _KINDS[kinds.pop()] if len(kinds) == 1 else CheckpointError
            raise kind("; ".join(texts)) from (outcome.cause if isinstance(outcome, _Failure) else None)

        self.decide(doing, verdict)
        return [each.value for each in outcomes if isinstance(each, _Success)]


@dataclass(frozen=True)
class _Success(Generic[T]):
    value: T


@dataclass(frozen=True)
class _Failure:
    kind: str
    text: str
    cause: BaseException | None

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors do not always pickle, and their tracebacks never do: the text crosses, the cause stays on its rank.
        return _Failure, (self.kind, self.text, None)


def _attempt(function: Callable[[], T]) -> _Success[T] | _Failure:
    # CheckpointException derives from BaseException; KeyboardInterrupt and SystemExit are let through.
    try:
        return _Success(function())
    except (Exception, CheckpointException) as error:
        kind = next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "CheckpointError")
        return _Failure(kind, describe(error), error)


def describe(error: BaseException) -> str:
    """One line for an error; of torch's CheckpointException, each rank's own error without its traceback."""
    if isinstance(error, CheckpointException):
        ranks_of: dict[str, list[int]] = {}
        for rank, wrapped in sorted(error.failures.items()):
            ranks_of.setdefault(describe(wrapped[0]), []).append(rank)
        return "; ".join(f"rank {_span(ranks)}: {text}" for text, ranks in ranks_of.items())
    if isinstance(error, tuple(_KINDS.values())):
        return str(error)
    if isinstance(error, pickle.UnpicklingError):
        # torch's own text is long, and advises loading the bytes with the safety off.
        return "the stored bytes are damaged (not what was pickled)"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _span(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
