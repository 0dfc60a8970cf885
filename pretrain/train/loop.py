"""The training job: step until done, and let the callbacks see every step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import psutil
import torch

from parallel import processes
from parallel.processes import Processes
from parallel.ranges import named
from pretrain import host
from pretrain.checkpoint.agreement import Agreement
from pretrain.checkpoint.lease import Lease
from pretrain.config import RunConfig
from pretrain.estimate import hardware, utilization
from pretrain.estimate.work import StepWork
from pretrain.exit import ERROR, FINISHED, PREEMPTED
from pretrain.figures import human
from pretrain.model.files import count, empty
from pretrain.profiling.record import profiler
from pretrain.train import heartbeat, layout, stages
from pretrain.train.balance import Balance
from pretrain.train.build import Assembled, assemble, or_usage
from pretrain.train.callback import Callback, Run
from pretrain.train.faults.events import FILE as EVENTS
from pretrain.train.faults.events import Events
from pretrain.train.faults.guard import Guard
from pretrain.train.faults.replica_check import ReplicaCheck
from pretrain.train.faults.rewind import Rewind
from pretrain.train.first_step import FirstStep
from pretrain.train.metrics import Metrics
from pretrain.train.near import Near
from pretrain.train.plot import LossCurve
from pretrain.train.progress import Progress
from pretrain.train.save import Save
from pretrain.train.signals import Arm, Signals
from pretrain.train.step import StepResult, train_step
from pretrain.train.validation import Validation


def train(config: RunConfig, extra: Sequence[Callback] = ()) -> int:
    """Trains, or goes on training, and returns the exit code. `extra` callbacks run before the built-in ones."""
    with Signals() as signals:
        heartbeat.watch(config)
        # Before anybody waits for anybody.
        stages.check(config, layout.check(config, int(os.environ.get("WORLD_SIZE", 1))))
        alone = config.engine.kind == "deepspeed"  # which wants a group for one rank, too
        heartbeat.phase("rendezvous")
        job = or_usage(lambda: processes.join(config.train.device, config.train.timeout, group_for_one=alone))
        try:
            notes = _settle(config, job)
            agreement = Agreement(timeout=job.timeout)
            heartbeat.joined(agreement)
            with Lease(config.run, agreement=agreement):
                loop = Loop(assemble(config, job, agreement), [Arm(signals), *extra], lambda: signals.flag, notes)
                try:
                    loop.begin()
                    while not loop.run.last:
                        loop.once()
                    return loop.end(signals.received)
                except BaseException as error:
                    heartbeat.error(error)
                    loop.run.broken = not hasattr(error, "exit_code")
                    raise
                finally:
                    loop.close()
        finally:
            processes.leave()


def _settle(config: RunConfig, job: Processes) -> list[str]:
    if job.device.type != "cpu":
        return []
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", job.world))
    return or_usage(lambda: host.settle(config.cpu, job.local_rank, neighbours))


class Loop:
    """One job's steps. `begin`, then `once` for every step, then `end`; `close` whatever happened."""

    def __init__(
        self, parts: Assembled, extra: Sequence[Callback], flag: Callable[[], bool], notes: Sequence[str] = ()
    ):
        self.run, self.parts, self.flag, self.notes = parts.run, parts, flag, notes
        config = parts.run.config
        self.progress = Progress(config.log.every)
        self.save = Save(parts.checkpoints, parts.loader, self.progress)
        self.near = Near(parts.near, parts.checkpoints, parts.loader, self.progress)
        # The order matters: balancing completes the record; saving comes last, so that a saved step lacks nothing.
        self.callbacks: list[Callback] = [
            *extra,
            stages.Stages(parts.loader, self.progress),
            Balance(parts.mesh),
            Metrics(config.log.tensorboard),
            self.progress,
            FirstStep(self.progress.say),
            Validation(parts.validation, self.progress, parts.mesh, flag),
            self.near,
            self.save,
            LossCurve(),
            *profiler(config, self.progress.say),  # last: what it measures includes the others
        ]
        self.work = StepWork(config, parts.mesh.grid, self.run.processes.device.type == "cuda")
        self.events = Events(config.run, self.run.processes.first, self.progress.say)
        self.guard = Guard(self.run, self.events)
        self.rewind = Rewind(self.run, parts.checkpoints, parts.loader, self.save, self.callbacks)
        self.replica_check = ReplicaCheck(self.run, self.events, self.rewind)
        self.memory = psutil.Process()

    def begin(self) -> None:
        nominal, measured, objection = _peaks(self.run)
        self.utilization = utilization.of_chip(nominal, measured, str(self.run.config.hardware or "the hardware file"))
        for callback in self.callbacks:
            callback.on_start(self.run)
        _announce(self.run, self.parts, self.progress)
        if objection is not None:
            self.progress.say(objection)
        for line in (*self.notes, self.replica_check.scope, self.guard.scope):
            if line is not None:
                self.progress.say(line)

    def once(self) -> None:
        """One step, its metrics, and everything that hangs on it."""
        run, config = self.run, self.run.config
        heartbeat.phase("step", run.step + 1)
        start = time.perf_counter()
        with named("data"):
            batches = self.parts.loader.batches(run.step)
        lr = config.optimizer.lr * config.schedule.factor(run.step, config.train.steps)
        result = train_step(
            run.engine, batches, lr, run.processes, config.train.precision, self.guard, self.flag(), self.parts.mesh
        )
        if result.flagged:
            run.stop = "preempted"
        if self.guard.settle(run.step + 1, result) and self._rolled_back(result):
            return
        run.step += 1
        tokens = self.parts.loader.stage(run.step - 1).step_tokens
        run.tokens += tokens
        seconds = time.perf_counter() - start
        shares, impossible = self.utilization.of(self.work.of(batches), seconds)
        for each in impossible:
            self.events.add(run.step, "impossible", each.text, level="error", ceiling=each.ceiling.name)
        run.record = {
            "step": run.step,
            "tokens": run.tokens,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            **shares,
            "memory_bytes": _memory(run.processes, self.memory),
        }
        run.record |= self.parts.loader.numbers(run.step, batches)
        if not result.updated:
            run.record["skipped"] = True
        if self.replica_check.went_back(saving=self.save.due(run) or self.near.due(run)):
            return
        for callback in self.callbacks:
            with named(callback.phase):
                callback.on_step(run)

    def _rolled_back(self, result: StepResult) -> bool:
        """Goes back from the step that was just computed and not made; False where there is no checkpoint to go to."""
        run, step, least = self.run, self.run.step + 1, self.run.config.faults.rewind
        assert result.fault is not None
        numbers = {"loss": result.loss, "grad_norm": result.grad_norm, "origin": step}
        if not self.rewind.to(step - least, past=step):
            text = f"no checkpoint is {least} steps (faults.rewind) older than this step: no rollback"
            self.events.add(step, "no rollback", text, **numbers)
            self.guard.keep(step, result)
            return False
        span = f"steps {run.step + 1} to {step}"
        text = f"{result.fault.text}: back to the checkpoint of step {run.step}, without the data of {span}"
        self.events.add(step, "rollback", text, to=run.step, skipped=self.parts.loader.skipped, **numbers)
        return True

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
        if run.config.profile is not None and self.utilization.faulty:
            self.progress.say(
                f"{run.folder / EVENTS} says what is wrong with {' and '.join(sorted(self.utilization.faulty))}"
            )
            return ERROR
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
        f"{human(parts.loader.stage(run.step).step_tokens)} tokens a step"
    )
    if parts.mesh.grid.world > parts.mesh.dp_size:
        progress.say(parts.mesh.draw())
    start = f"starting from {config.train.initial}" if config.train.initial else "starting from scratch"
    progress.say(f"resumed after step {run.step}" if parts.resumed else start)
    for text in (*parts.loader.describe(), *layout.describe_memory(config, parts.mesh.grid)):
        progress.say(text)


def _peaks(run: Run) -> tuple[float | None, float, str | None]:
    """(nominal, measured) FLOP/s of this rank's device, and why the hardware file's measurement was not used, if it was not."""
    device, precision = run.processes.device, run.config.train.precision
    chip = hardware.read(run.config.hardware) if run.config.hardware else hardware.detect(device)
    measured, objection = hardware.ceiling(chip, device, precision)
    nominal = chip.peak(precision) if chip else None
    return nominal, measured, objection and f"mfu_measured: {run.config.hardware or 'the hardware file'}: {objection}"


def _memory(job: Processes, process: psutil.Process) -> int:
    """Bytes: the device's peak on a GPU, this process's resident memory on a CPU."""
    if job.device.type == "cuda":
        return torch.cuda.max_memory_allocated(job.device)
    return process.memory_info().rss
