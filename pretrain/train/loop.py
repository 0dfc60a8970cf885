"""The training job: step until done, and let the callbacks see every step."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence

import psutil
import torch

from parallel import processes
from parallel.processes import Processes
from pretrain.checkpoint.agreement import Agreement
from pretrain.checkpoint.lease import Lease
from pretrain.config import RunConfig
from pretrain.data.batch import Batch
from pretrain.estimate import flops, hardware
from pretrain.exit import FINISHED, NUMERICAL, PREEMPTED, Exit
from pretrain.model.decoder import Decoder
from pretrain.model.files import count, empty
from pretrain.train import heartbeat, layout
from pretrain.train.balance import Balance
from pretrain.train.build import Assembled, assemble, or_usage
from pretrain.train.callback import Callback, Run
from pretrain.train.metrics import Metrics
from pretrain.train.plot import LossCurve
from pretrain.train.progress import Progress, human
from pretrain.train.save import Save
from pretrain.train.signals import Arm, Signals
from pretrain.train.step import train_step
from pretrain.train.validation import Validation


def train(config: RunConfig, extra: Sequence[Callback] = ()) -> int:
    """Trains, or goes on training, and returns the exit code. `extra` callbacks run before the built-in ones."""
    with Signals() as signals:
        heartbeat.watch(config)
        layout.check(config, int(os.environ.get("WORLD_SIZE", 1)))  # before anybody waits for anybody
        alone = config.engine.kind == "deepspeed"  # which wants a group for one rank, too
        heartbeat.phase("rendezvous")
        job = or_usage(lambda: processes.join(config.train.device, config.train.timeout, group_for_one=alone))
        try:
            agreement = Agreement()
            heartbeat.joined(agreement)
            with Lease(config.run, agreement=agreement):
                loop = Loop(assemble(config, job, agreement), [Arm(signals), *extra], lambda: signals.flag)
                try:
                    loop.begin()
                    while not loop.run.last:
                        loop.once()
                    return loop.end(signals.received)
                except BaseException as error:
                    heartbeat.error(error)
                    raise
                finally:
                    loop.close()
        finally:
            processes.leave()


class Loop:
    """One job's steps. `begin`, then `once` for every step, then `end`; `close` whatever happened."""

    def __init__(self, parts: Assembled, extra: Sequence[Callback], flag: Callable[[], bool]):
        self.run, self.parts, self.flag = parts.run, parts, flag
        config = parts.run.config
        self.progress = Progress(config.log.every)
        # The order matters: balancing completes the record; saving comes last, so that a saved step lacks nothing.
        self.callbacks: list[Callback] = [
            *extra,
            Balance(parts.mesh),
            Metrics(config.log.tensorboard),
            self.progress,
            Validation(parts.validation, self.progress, parts.mesh, flag),
            Save(parts.checkpoints, parts.loader, self.progress),
            LossCurve(),
        ]
        self.whole = empty(config.model)  # for counting: this rank may hold a part of the model only
        self.sharers = parts.mesh.grid.world // parts.mesh.dp_size  # ranks that compute one batch together
        self.bad_steps = 0
        self.memory = psutil.Process()

    def begin(self) -> None:
        self.nominal, self.measured = _peaks(self.run)
        for callback in self.callbacks:
            callback.on_start(self.run)
        _announce(self.run, self.parts, self.progress)

    def once(self) -> None:
        """One step, its metrics, and everything that hangs on it."""
        run, config = self.run, self.run.config
        heartbeat.phase("step", run.step + 1)
        start = time.perf_counter()
        batches = self.parts.loader.batches(run.step)
        lr = config.optimizer.lr * config.schedule.factor(run.step, config.train.steps)
        result = train_step(
            run.engine, batches, lr, run.processes, config.train.precision, self.flag(), self.parts.mesh
        )
        run.step += 1
        tokens = config.train.batch * config.data.sequence_length
        run.tokens += tokens
        seconds = time.perf_counter() - start
        speed = _flops(self.whole, batches) / self.sharers / seconds
        run.record = {
            "step": run.step,
            "tokens": run.tokens,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": None if self.nominal is None else speed / self.nominal,
            "mfu_measured": speed / self.measured,
            "memory_bytes": _memory(run.processes, self.memory),
        }
        self._count_bad_steps(result.grad_norm)
        if result.flagged:
            run.stop = "preempted"
        for callback in self.callbacks:
            callback.on_step(run)

    def _count_bad_steps(self, grad_norm: float) -> None:
        self.bad_steps = 0 if math.isfinite(grad_norm) else self.bad_steps + 1
        if self.bad_steps:
            text = f"step {self.run.step}: the gradient is not finite, update skipped ({self.bad_steps} in a row)"
            self.progress.say(text)
        if self.bad_steps >= self.run.config.train.bad_steps:
            text = f"{self.bad_steps} steps in a row had a gradient that is not finite; the newest checkpoint is kept"
            raise Exit(text, NUMERICAL)

    def end(self, received: str | None) -> int:
        """The exit code, after the callbacks' last words."""
        run = self.run
        heartbeat.phase("end", run.step)
        for callback in self.callbacks:
            callback.on_end(run)
        if run.stop == "preempted":
            who = received or "a signal on another rank"
            self.progress.say(f"stopped by {who} after step {run.step}; run again to go on")
            return PREEMPTED
        self.progress.say(f"finished {run.step} steps; loss curve: {run.folder / 'loss.png'}")
        return FINISHED

    def close(self) -> None:
        heartbeat.phase("end", self.run.step)
        self.parts.loader.close()
        for callback in self.callbacks:
            callback.close()


def _announce(run: Run, parts: Assembled, progress: Progress) -> None:
    config = run.config
    total, active = count(empty(config.model))
    progress.say(
        f"{config.run}: {human(total)} parameters, {human(active)} active; {parts.mesh.picture()}; "
        f"{config.engine.kind} engine, {config.train.precision}; "
        f"{human(config.train.batch * config.data.sequence_length)} tokens a step"
    )
    if parts.mesh.grid.world > parts.mesh.dp_size:
        progress.say(parts.mesh.draw())
    start = f"starting from {config.train.initial}" if config.train.initial else "starting from scratch"
    progress.say(f"resumed after step {run.step}" if parts.resumed else start)


def _peaks(run: Run) -> tuple[float | None, float]:
    """(nominal, measured) FLOP/s of this rank's device."""
    device, precision = run.processes.device, run.config.train.precision
    chip = hardware.read(run.config.hardware) if run.config.hardware else hardware.detect(device)
    return (chip.peak(precision) if chip else None), hardware.measured_peak(device, precision)


def _flops(model: Decoder, batches: Sequence[Batch]) -> float:
    """This rank's useful FLOPs of one step."""
    total = 0.0
    for batch in batches:
        context = flops.mean_context((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist())
        total += batch.tokens.numel() * flops.training_flops_per_token(model, context)
    return total


def _memory(job: Processes, process: psutil.Process) -> int:
    """Bytes: the device's peak on a GPU, this process's resident memory on a CPU."""
    if job.device.type == "cuda":
        return torch.cuda.max_memory_allocated(job.device)
    return process.memory_info().rss
