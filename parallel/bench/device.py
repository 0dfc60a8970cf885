"""Timing on GPUs: events on a stream, a stream of one's choice, and a CUDA graph of collectives.

The host only enqueues; device time between events is what counts. That holds for NVIDIA and AMD: torch calls both "cuda".
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from parallel.bench.timing import Call, Clock

STREAMS = ("current", "own", "side")


@dataclass(frozen=True)
class Launch:
    """How collectives are launched on a GPU.

    stream: "current", the one that computes (a synchronous call); "own", the process group's (an asynchronous call and a wait, as
    an engine that hides communication makes them); "side", another stream made current. graph: collectives in one CUDA graph, 0
    for none. priority: streams of high priority.
    """

    stream: str = "current"
    graph: int = 0
    priority: bool = False

    def prepare_environment(self) -> None:
        """Before the job is joined: torch reads the priority of its process groups' streams then."""
        if self.priority:
            os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")

    def side_stream(self) -> torch.cuda.Stream | None:
        if self.stream != "side" and not self.graph:
            return None  # capture is not allowed on the default stream
        return torch.cuda.Stream(priority=-1 if self.priority else 0)


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(call: Call, times: int, stream: torch.cuda.Stream) -> Callable[[], None]:
    """A call that replays a graph of `times` collectives. They have to have run before, so that communicators exist."""
    with _on(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # thread_local: torch's watchdog thread asks for the state of earlier collectives while we capture.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(times):
            call()
    return graph.replay


def event_clock(
    call: Call, stream: torch.cuda.Stream | None, isolated: bool = False, meet: Call | None = None
) -> Clock:
    """A clock (timing.py) that notes the device's time, not the host's."""
    events: list[torch.cuda.Event] = []

    def enough(count: int) -> None:
        while len(events) < count:
            events.append(torch.cuda.Event(enable_timing=True))

    def ends(iterations: int) -> list[float]:
        enough(iterations + 1)
        with _on(stream):
            events[0].record()
            for event in events[1 : iterations + 1]:
                call()
                event.record()
        torch.cuda.synchronize()
        return [events[0].elapsed_time(event) * 1000 for event in events[1 : iterations + 1]]

    def durations(iterations: int) -> list[float]:
        assert meet is not None
        enough(2)
        times = []
        for _ in range(iterations):
            meet()
            with _on(stream):
                events[0].record()
                call()
                events[1].record()
            torch.cuda.synchronize()
            times.append(events[0].elapsed_time(events[1]) * 1000)
        return times

    return durations if isolated else ends
