"""One side of the bench in a process of its own, on the host as each finds it in real use.

What becomes of freed memory, of large pages and of denormal numbers, and which library multiplies, is settled for a whole
process: two models in one process would share what our runs do about them (`pretrain/host.py`, `pretrain/main.py`).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from launch.step_bench.models import Task, ours, theirs

LARGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}  # torch reads it once, at its first tensor


class Worker:
    """A process with a model in training: "ours", or theirs by the name of how it is fed (`Task.feeds`).

    settled: on its host as our runs settle themselves.
    `ask` for "loss" (float), "step" (seconds), "memory" (bytes or None), "parameters".
    """

    def __init__(self, who: str, task: Task, threads: int | None, settled: bool):
        self.who = who
        self.connection, other = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=_serve, args=(other, who, task, threads, settled), daemon=True)
        environment = dict(os.environ)
        os.environ |= {**LARGE_PAGES, **environment} if settled else {}
        try:
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(environment)
        other.close()
        self._answer()

    def ask(self, what: str) -> Any:
        self.connection.send(what)
        return self._answer()

    def _answer(self) -> Any:
        try:
            good, answer = self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"the process of {self.who} ended with exit code {self.process.exitcode}") from None
        if not good:
            raise RuntimeError(f"{self.who}: {answer}")
        return answer

    def close(self) -> None:
        self.connection.close()  # the process ends with that
        self.process.join()


def _serve(connection: Connection, who: str, task: Task, threads: int | None, settled: bool) -> None:
    # transformers imports DeepSpeed where it finds it, which warns on the console of a machine without a GPU unless told.
    os.environ.setdefault("DS_ACCELERATOR", task.device)
    try:
        import torch

        from kernels.benching.memory import peak_bytes
        from pretrain import host

        if threads:
            torch.set_num_threads(threads)
        if settled:
            host.settle_process(host.CpuConfig())
        side = ours(task) if who == "ours" else theirs(task, who)

        def loss() -> float:
            with torch.no_grad():
                return side.loss().item()

        def step() -> float:
            gc.collect()
            start = time.perf_counter()
            side.step()
            return time.perf_counter() - start

        answers = {
            "loss": loss,
            "step": step,
            "memory": lambda: peak_bytes(side.step, torch.device(task.device)),
            "parameters": lambda: sum(parameter.numel() for parameter in side.model.parameters()),
        }
        connection.send((True, None))
        while True:
            connection.send((True, answers[connection.recv()]()))
    except EOFError:
        return  # nobody asks any more
    except Exception:
        connection.send((False, traceback.format_exc()))
