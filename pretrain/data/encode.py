"""Units to finished units, on several processes: read, filtered, digested, encoded, sorted and committed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from pretrain.data import interruption
from pretrain.data.errors import PrepareFailure
from pretrain.data.parts import LOSSY, TABLE, VALIDATION, Parts, RunRecord, UnitRecord, write_run
from pretrain.data.sources import Reading
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.units import Unit, documents_of
from pretrain.data.writer import dtype_for

if TYPE_CHECKING:
    from pretrain.data.filters import Filters

RUN_BYTES, RUN_DOCUMENTS = 32_000_000, 200_000
_POLL_SECONDS = 0.2
_SHUFFLED = 0x73687566666C65  # sets the order's hash apart from the split's


@dataclass(frozen=True)
class Work:
    """What a process needs to make units. limit_bytes: of distinct documents, after which a unit need not go on."""

    folder: Path
    reading: Reading
    seed: int
    validation: float
    filters: Filters | None = None
    signatures: bool = False
    limit_bytes: int | None = None


def digest_of(raw: bytes) -> bytes:
    """xxh3_128 of a document's UTF-8: what tells documents apart."""
    return xxhash.xxh3_128_digest(raw)


def split_of(digest: bytes, seed: int, validation: float) -> str:
    """The split of a document with this xxh3_128 digest: decided by its content alone, so that other documents cannot
    move it.
    """
    return "validation" if xxhash.xxh3_64_intdigest(digest, seed=seed) < validation * 2.0**64 else "train"


def key_of(digest: bytes, seed: int) -> int:
    """The place of a document in the shuffled order, 64 bits: as blind to other documents as its split."""
    return xxhash.xxh3_64_intdigest(digest, seed=seed ^ _SHUFFLED)


class _Run:
    """Documents of a unit, until there are enough of them to be sorted and written."""

    def __init__(self, tokenizer: Tokenizer, work: Work, dtype: np.dtype) -> None:
        self.tokenizer = tokenizer
        self.work = work
        self.dtype = dtype
        self.code = {"uint16": "H", "int32": "i"}[dtype.name]
        self.bos, self.eos = tokenizer.bos, tokenizer.eos
        self.bytes = 0
        self.rows: list[tuple[int, int, int, int, int, int, int]] = []
        self.tokens: list[bytes] = []
        self.held_out: dict[int, bytes] = {}
        self.signed: list[str] = []

    def add(self, text: str, raw: bytes, digest: bytes, place: int) -> None:
        """Encodes a document as bos, tokens, eos."""
        ids = self.tokenizer.encode(text)
        # In one call, several times as quick as numpy's conversion of a list.
        self.tokens.append(struct.pack(f"<{len(ids) + 2}{self.code}", self.bos, *ids, self.eos))
        held = split_of(digest, self.work.seed, self.work.validation) == "validation"
        if held:
            self.held_out[len(self.rows)] = raw
        high, low = struct.unpack(">QQ", digest)
        key = key_of(digest, self.work.seed)
        self.rows.append((key, high, low, len(raw), place, len(ids) + 2, VALIDATION if held else 0))
        if self.work.signatures:
            self.signed.append(text)
        self.bytes += len(raw)

    def write(self, folder: Path, number: int) -> RunRecord:
        """Sorts the documents by key and writes them as run `number` of the unit in `folder`."""
        table = np.array(self.rows, TABLE)
        spelled = self.tokenizer.token_bytes[np.frombuffer(b"".join(self.tokens), self.dtype)]
        ends = np.cumsum(table["tokens"], dtype=np.int64)
        found = np.add.reduceat(spelled, ends - table["tokens"], dtype=np.int64)
        table["flags"] |= np.where(found != table["bytes"].astype(np.int64), LOSSY, 0).astype(np.uint8)
        order = np.lexsort((table["low"], table["high"], table["key"]))
        files = {
            "table": table[order].tobytes(),
            "tokens": b"".join([self.tokens[i] for i in order.tolist()]),
            "text": b"".join([self.held_out[i] for i in order.tolist() if i in self.held_out]),
        }
        if self.work.signatures:
            from pretrain.data.near import signatures

            files["signatures"] = signatures(self.signed)[order].tobytes()
        return write_run(folder, number, files, len(table))


def make_unit(
    unit: Unit, work: Work, tokenizer: Tokenizer, check: Callable[[], None] = interruption.check
) -> UnitRecord:
    """Makes and commits a unit; one that is finished already is made again. check: called often, may raise to stop.

    Raises DataError or ValueError as the reading policy says.
    """
    parts = Parts(work.folder)
    reading = replace(work.reading, undecodable=0, skipped=[])
    dtype = dtype_for(tokenizer.vocabulary_size)
    dropped: Counter[str] = Counter(duplicate=0, empty=0)
    runs: list[RunRecord] = []
    seen: set[bytes] = set()
    total = place = 0
    with parts.unit(unit.key) as (folder, content):
        stamp = unit.stamp()
        run = _Run(tokenizer, work, dtype)
        for text in documents_of(unit, reading):
            check()
            raw = text.encode()
            reason = (
                "empty" if not raw else work.filters.reject(text, reading.tag) if work.filters is not None else None
            )
            digest = digest_of(raw)
            if reason is None and digest in seen:
                reason = "duplicate"  # others are found when units are merged; these need not be encoded
            if reason is not None:
                dropped[reason] += 1
                continue
            seen.add(digest)
            run.add(text, raw, digest, place)
            place += 1
            total += len(raw)
            if run.bytes >= RUN_BYTES or len(run.rows) >= RUN_DOCUMENTS:
                runs.append(run.write(folder, len(runs)))
                run = _Run(tokenizer, work, dtype)
                if work.limit_bytes is None:
                    seen.clear()  # so that memory does not grow with the unit
            if work.limit_bytes is not None and total >= work.limit_bytes:
                break
        if run.rows:
            runs.append(run.write(folder, len(runs)))
        dropped["unreadable"] = reading.undecodable
        content.update(stamp=stamp, bytes=total, dropped=dict(dropped), notes=reading.skipped, runs=runs)
    return UnitRecord(key=unit.key, **content)


_made: tuple[Work, Tokenizer, Any] | None = None


def _start(work: Work, tokenizer: Path, stop: Any) -> None:
    global _made
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    _made = work, Tokenizer(tokenizer), stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Pool workers wait for work for ever; killed with SIGKILL, the parent cannot tell them to stop.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Stopped(Exception):
    """The parent does not want the unit any more."""


def _run(unit: Unit) -> UnitRecord:
    assert _made is not None, "worker not initialised"
    work, tokenizer, stop = _made

    def check() -> None:
        if stop.value:
            raise _Stopped

    return make_unit(unit, work, tokenizer, check)


def make_all(
    units: Iterable[Unit], work: Work, tokenizer: Path, workers: int, more: Callable[[], bool] = lambda: True
) -> Iterator[tuple[Unit, UnitRecord]]:
    """Makes units on `workers` processes (in this one, if 1) and yields each as it is finished, in any order.

    more: asked before a unit is begun; once it says no, what has begun is finished and nothing else. Raises
    PrepareFailure if a worker is killed, DataError or ValueError as the reading policy says.
    """
    if workers == 1:
        encoder = Tokenizer(tokenizer)
        for unit in units:
            if not more():
                return
            yield unit, make_unit(unit, work, encoder)
        return
    # Spawned, not forked: the parent has threads.
    context = multiprocessing.get_context("spawn")
    # A byte of shared memory: an Event has a lock, which a worker that is killed while it asks would keep for ever.
    stop = context.RawValue("b", 0)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(work, tokenizer, stop))
    waiting: dict[Future[UnitRecord], Unit] = {}
    ahead = iter(units)
    try:
        while True:
            while len(waiting) < 2 * workers and more() and (following := next(ahead, None)) is not None:
                with interruption.held():  # it may start a worker
                    waiting[pool.submit(_run, following)] = following
            if not waiting:
                return
            interruption.check()
            for future in wait(waiting, _POLL_SECONDS, FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool:
        raise PrepareFailure(
            "a worker process was killed, most likely for want of memory; pass fewer `--workers`, or "
            "`--document-bytes 1000000` if single documents are very long; the same command goes on from the units that "
            "are finished"
        ) from None
    finally:
        stop.value = 1
        pool.shutdown(wait=True, cancel_futures=True)
