"""Steps under torch's profiler: a callback of the training loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd import DeviceType

from kernels.benching.memory import memory_levels
from parallel.ranges import PREFIX
from pretrain.profiling.attribution import MODULE, Event, attribute
from pretrain.profiling.report import Profile, write
from pretrain.train.callback import Callback, Run

if TYPE_CHECKING:
    from pretrain.config import RunConfig

FOLDER = "profile"


def profiler(config: RunConfig, say: Callable[[str], None]) -> list[Callback]:
    """The callback, if the configuration asks for it. say: prints a text, on the talking rank only."""
    return [] if config.profile is None else [Recorder(config, say)]


class Recorder(Callback):
    """Writes RUN/profile/step_N.rank_R.{trace.json.gz,json,txt,png} for the steps from N on."""

    def __init__(self, config: RunConfig, say: Callable[[str], None]):
        assert config.profile is not None
        self.config, self.say = config.profile, say
        self.compiled = config.train.compile
        self.torch: Any = None
        self.ranges: ModuleRanges | None = None

    def on_start(self, run: Run) -> None:
        if run.step >= self.config.start:
            self.say(f"profile: step {self.config.start} is past (the run is at {run.step}); nothing is profiled")
        self._begin(run)

    def on_step(self, run: Run) -> None:
        if self.torch is not None and (run.step >= self.config.start + self.config.steps - 1 or run.last):
            self._finish(run)
        self._begin(run)

    def on_rewind(self, run: Run) -> None:
        self.close()  # steps that were not to be
        self._begin(run)

    def _begin(self, run: Run) -> None:
        mine = self.config.ranks == "all" or run.processes.first
        if run.step + 1 != self.config.start or not mine or run.last or self.torch is not None:
            return
        # Kineto tells of every start and stop otherwise.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        cuda = run.processes.device.type == "cuda"
        activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * cuda]
        self.ranges = ModuleRanges(run.model, self.compiled)
        self.torch = torch.profiler.profile(activities=activities, profile_memory=self.config.memory, acc_events=True)
        self.torch.start()

    def _finish(self, run: Run) -> None:
        if run.processes.device.type == "cuda":
            torch.cuda.synchronize(run.processes.device)
        self.torch.stop()
        assert self.ranges is not None
        self.ranges.close()
        kept, self.torch, self.ranges = self.torch, None, None
        folder = run.folder / FOLDER
        folder.mkdir(exist_ok=True)
        stem = folder / f"step_{self.config.start:08d}.rank_{run.processes.rank}"
        kept.export_chrome_trace(f"{stem}.trace.json.gz")
        profile = read(kept, run.processes.device.type, self.config.start)
        write(profile, stem)
        self.say(profile.table())
        self.say(f"profile: {stem}.txt, .png, .json and .trace.json.gz (open it with https://ui.perfetto.dev)")

    def close(self) -> None:
        if self.torch is not None:
            self.torch.stop()
            self.torch = None
        if self.ranges is not None:
            self.ranges.close()
            self.ranges = None


class ModuleRanges:
    """Names the forward pass of every module in the profile, until closed.

    compiled: blocks are compiled, and what is within them is seen by the compiler only, which would compile anew with a range
    around it; then blocks and what is outside of them are named.
    """

    def __init__(self, model: nn.Module, compiled: bool = False):
        self.handles: list[Any] = []
        self.open: list[Any] = []
        for name, module in model.named_modules():
            if (
                name
                and not isinstance(module, nn.ModuleList | nn.ModuleDict)
                and not (compiled and _within_block(name))
            ):
                self.handles.append(module.register_forward_pre_hook(self._enter(name), prepend=True))
                self.handles.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, arguments: Any) -> None:
            opened = torch.profiler.record_function(MODULE + name)
            opened.__enter__()
            self.open.append(opened)

        return enter

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.open.pop().__exit__(None, None, None)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def _within_block(name: str) -> bool:
    parts = name.split(".")
    return any(part.isdigit() for part in parts) and not parts[-1].isdigit()


def read(kept: Any, device: str, start: int) -> Profile:
    """What a stopped torch.profiler.profile has recorded, attributed."""
    found = list(kept.profiler.kineto_results.events())
    events = list(_events(found))
    main = next((event.thread for event in events if event.name.startswith(PREFIX)), 0)
    spent = attribute(events, main)
    begin = min((event.start for event in events if event.name == PREFIX + "data"), default=0.0)
    return Profile(start, spent, _timeline(found, device, begin), _device_times(found))


def _events(found: Sequence[Any]) -> Iterator[Event]:
    for event in found:
        if event.device_type() == DeviceType.CPU and event.name() != "[memory]":
            name, begin = event.name(), event.start_ns() / 1e9
            plain = not event.is_user_annotation() and not name.startswith(PREFIX)
            end = begin + event.duration_ns() / 1e9
            yield Event(name, begin, end, event.start_thread_id(), event.sequence_nr(), plain and not event.is_async())


def _timeline(found: Sequence[Any], device: str, begin: float) -> list[tuple[float, int]]:
    """(seconds since the first profiled step began, bytes allocated since then, freed ones deducted)."""
    kind = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    return [(time / 1e9 - begin, level) for time, level in memory_levels(found, kind)]


def _device_times(found: Sequence[Any]) -> dict[str, float]:
    """Seconds of every kernel by name, where there is a GPU."""
    times: dict[str, float] = {}
    for event in found:
        if event.device_type() != DeviceType.CPU and event.name() != "[memory]":
            times[event.name()] = times.get(event.name(), 0.0) + event.duration_ns() / 1e9
    return times
