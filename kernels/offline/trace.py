"""Compiles what a library would launch, without a device.

Triton asks a driver which device it runs on. A stand-in driver answers with the chosen architecture, and launches
are turned into warm-ups, which compile and stop there. What is compiled is therefore exactly what the real launch
would compile: the same specialisation of integers and pointers, the same checks of the launch options. Signatures
written by hand for `triton.compile` check a different kernel (without the divisibility attributes all loads are
narrow) and accept options that the launch rejects.

Tensors live on the CPU. Values are meaningless after the first launch, shapes and types are right; so the backward pass
compiles too.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kernels.architecture import ARCHITECTURES, Architecture, assume
from kernels.dispatch import interpreting


@dataclass
class Launch:
    """One launch that was compiled instead of run."""

    kernel: str
    grid: tuple[int, ...] | None
    constants: Mapping[str, Any]  # the constexpr arguments
    options: Mapping[str, Any]  # num_warps, num_stages, ...
    compiled: Any = None  # triton.compiler.CompiledKernel
    error: str | None = None
    seconds: float = 0.0


@dataclass
class Trace:
    """The launches made while tracing, in order; a launch repeated with the same binary is kept once."""

    arch: Architecture
    launches: list[Launch] = field(default_factory=list)

    def add(self, launch: Launch) -> None:
        if launch.compiled is not None and any(
            launch.compiled.hash == other.compiled.hash for other in self.launches if other.compiled is not None
        ):
            return
        self.launches.append(launch)


class _Driver:
    """Answers for a device that is not there. Triton asks for more only when a kernel is loaded, which never
    happens."""

    def __init__(self, arch: Architecture) -> None:
        from triton.backends.compiler import GPUTarget

        if arch.vendor == "amd":
            self.target = GPUTarget("hip", arch.name, arch.warp_size)
        else:
            self.target = GPUTarget("cuda", arch.capability, arch.warp_size)
        # The compiled variants of a kernel are kept per device number, together with the target: one number a target.
        self.number = 1000 + list(ARCHITECTURES).index(arch.name)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed while compiling offline: kernels take their parameters from a table")


@contextlib.contextmanager
def tracing(arch: Architecture) -> Iterator[Trace]:
    """Within this context, launches of Triton kernels compile for `arch`; collects them.

    Needs a process that never ran under TRITON_INTERPRET=1: interpreted kernels cannot be compiled.
    """
    if interpreting():
        raise ValueError("kernels cannot be compiled under TRITON_INTERPRET=1; unset it")
    if arch.vendor == "none":
        raise ValueError("'generic' is no target of a compiler; choose a real architecture such as gfx942 or sm90")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    trace = Trace(arch)
    real_run, real_driver = JITFunction.run, driver._active

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launch = _describe(self, args, grid, kwargs)
        began = time.perf_counter()
        try:
            # ptxas failures print the whole program; the message is in the exception as well
            with contextlib.redirect_stdout(io.StringIO()):
                launch.compiled = real_run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:
            launch.error = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        launch.seconds = time.perf_counter() - began
        trace.add(launch)
        return launch.compiled

    JITFunction.run = run
    driver.set_active(_Driver(arch))
    try:
        with assume(arch.name):
            yield trace
    finally:
        JITFunction.run = real_run
        driver._active = real_driver


def _describe(function: Any, args: tuple[Any, ...], grid: Any, kwargs: Mapping[str, Any]) -> Launch:
    names = list(function.arg_names)
    given = {**dict(zip(names, args)), **kwargs}
    constants = {
        parameter.name: _plain(given[parameter.name])
        for parameter in function.params
        if parameter.is_constexpr and parameter.name in given
    }
    options = {name: value for name, value in kwargs.items() if name not in names}
    launch = Launch(function.fn.__name__, None, constants, options)
    try:
        blocks = grid(given) if callable(grid) else grid
        launch.grid = tuple(int(size) for size in blocks)
    except Exception as error:
        launch.error = f"the grid cannot be computed: {type(error).__name__}: {error}"
    return launch


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def trace_call(arch: Architecture, call: Callable[[], Any]) -> Trace:
    """The launches that `call` makes, compiled for `arch`."""
    with tracing(arch) as trace:
        call()
    return trace
