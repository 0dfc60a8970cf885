"""Watchers on machines that are slow to answer: nothing is taken for silence that only takes its time."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.watch import watcher
from pretrain.watch.process import QUIET, Stacks, frames
from pretrain.watch.watcher import Watcher

OTHER = 'Thread 0x00000001 (most recent call first):\n  File "other.py", line 1 in other\n\n'
MAIN = 'Current thread 0x00000002 (most recent call first):\n  File "main.py", line 2 in main\n'


def test_stacks_are_complete_when_the_main_threads_is_among_them() -> None:
    """The process is interrupted, for longer than stacks are expected to pause, between two threads' stacks."""
    stacks = Stacks()
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:

        def answer(number: int, frame: Any) -> None:
            os.write(stacks.file, OTHER.encode())
            time.sleep(3 * QUIET)
            os.write(stacks.file, MAIN.encode())
            signal.signal(number, lambda *_: os.write(stacks.file, OTHER.encode()))

        signal.signal(signal.SIGUSR2, answer)
        os.write(told, b".")
        while True:
            time.sleep(10)
    try:
        os.read(ready, 1)
        text = stacks.ask(child, 2)
        assert text == OTHER + MAIN and [str(frame) for frame in frames(text, 2)] == ["main (main.py:2)"]
        # Without it they end when nothing more has come for a while: also where that thread cannot answer.
        assert stacks.ask(child) == OTHER
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_that_answers_late_is_heard_with_the_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, asked = threading.Event(), []

    def is_dir() -> bool:
        asked.append(threading.current_thread())
        return answer.wait(60)

    monkeypatch.setattr(watcher, "MARK", 0.01)
    pulse = SimpleNamespace(facts=lambda: {"attempt": "1", "folder": "/none"})
    mine = Watcher(0, pulse, Stacks())  # type: ignore[arg-type]
    monkeypatch.setattr(mine, "_folder", lambda: SimpleNamespace(is_dir=is_dir))
    assert [mine._mark() for _ in range(3)] == [False] * 3
    assert len(asked) == 1  # not one thread for each look
    answer.set()
    asked[0].join(60)
    assert mine._mark()


def test_a_folder_that_is_not_there_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pulse = SimpleNamespace(facts=lambda: {"attempt": "1", "folder": str(tmp_path)})
    mine = Watcher(0, pulse, Stacks())  # type: ignore[arg-type]
    assert not mine._mark()
    mine._folder().mkdir(parents=True)
    assert mine._mark()
