"""Peak memory of a call, beyond what was allocated before it: activations, gradients, scratch."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the highest point of `call` above the level at its start; None where torch does not tell.

    GPU: the caching allocator's own counter. CPU: torch's profiler, which sees every allocation of a tensor.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return _on_cpu(call)


def _on_cpu(call: Callable[[], object]) -> int | None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces every start and stop on stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    try:
        levels = memory_levels(profile.profiler.kineto_results.events(), DeviceType.CPU)
    except (AttributeError, RuntimeError):  # the raw events are not a public interface of torch
        return None
    del result
    return max(0, *(level for _, level in levels)) if levels else None


def memory_levels(events: Iterable[Any], device: DeviceType) -> list[tuple[int, int]]:
    """(nanoseconds, bytes allocated on the device since the first of the events, freed ones deducted), in the order of time.

    events: raw ones of a profile with profile_memory=True.
    """
    changes = [
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and event.device_type() == device
    ]
    level, found = 0, []
    for time, change in sorted(changes, key=lambda pair: pair[0]):
        level += change
        found.append((time, level))
    return found
