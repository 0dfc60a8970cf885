"""Text to token ids on several processes, results in the order of the input whatever the number of processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data.errors import PrepareFailure
from pretrain.data.tokenizer import Tokenizer

BATCH_BYTES = 1 << 19
_AHEAD = 3


@dataclass(frozen=True)
class Encoded:
    """A batch of documents. ids: uint16 or int32, all documents end to end, each as bos, tokens, eos. lengths: int64
    [documents]. text_bytes: int64 [documents], bytes that the tokens of each stand for."""

    ids: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray


def encode_batch(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    """Encodes each text as [bos] + tokens + [eos]."""
    bos, eos, table = tokenizer.bos, tokenizer.eos, tokenizer.token_bytes
    # The type that Megatron picks for a vocabulary of this size.
    dtype = np.uint16 if tokenizer.vocabulary_size < 65500 else np.int32
    parts = [np.array([bos, *tokenizer.encode(text), eos], dtype) for text in texts]
    sizes = [int(table[part].sum()) for part in parts]
    return Encoded(np.concatenate(parts), np.array([len(part) for part in parts], np.int64), np.array(sizes, np.int64))


_tokenizer: Tokenizer | None = None


def _start(path: Path) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    _tokenizer = Tokenizer(path)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Pool workers wait for work for ever; killed with SIGKILL, the parent cannot tell them to stop.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(texts: list[str]) -> Encoded:
    assert _tokenizer is not None, "worker not initialised"
    return encode_batch(_tokenizer, texts)


def encode_all(batches: Iterable[list[str]], tokenizer_path: Path, workers: int) -> Iterator[Encoded]:
    """Encodes batches of documents on `workers` processes (in this one, if 1), a few batches ahead of the reader.

    Raises PrepareFailure if a worker is killed.
    """
    if workers == 1:
        tokenizer = Tokenizer(tokenizer_path)
        for texts in batches:
            yield encode_batch(tokenizer, texts)
        return
    # Spawned, not forked: the parent has threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(tokenizer_path,))
    try:
        waiting: deque[Future[Encoded]] = deque()
        for texts in batches:
            waiting.append(pool.submit(_run, texts))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise PrepareFailure(
            "a worker process was killed, most likely for want of memory; pass fewer `--workers`, or "
            "`--document-bytes 1000000` if single documents are very long"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
