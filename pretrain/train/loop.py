"""The training job: build everything, find the newest checkpoint, step until done."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import psutil
import torch

from parallel import engines, processes
from parallel.mesh import Mesh
from parallel.processes import Processes
from pretrain import config as configuration
from pretrain.checkpoint.agreement import Agreement
from pretrain.checkpoint.lease import Lease
from pretrain.checkpoint.lifecycle import Checkpoints
from pretrain.config import ConfigError, RunConfig
from pretrain.data.loader import Loader
from pretrain.data.store import Corpus
from pretrain.estimate import flops, hardware
from pretrain.exit import FINISHED, NUMERICAL, PREEMPTED, Exit
from pretrain.model.decoder import Decoder
from pretrain.train.balance import Balance
from pretrain.train.callback import Callback, Run
from pretrain.train.metrics import Metrics
from pretrain.train.plot import LossCurve
from pretrain.train.progress import Progress, human
from pretrain.train.save import FOLDER, Save, restore
from pretrain.train.signals import Signals
from pretrain.train.step import train_step
from pretrain.train.validation import Validation


def train(config: RunConfig, extra: Sequence[Callback] = ()) -> int:
    """Trains, or goes on training, and returns the exit code. `extra` callbacks run before the built-in ones."""
    with Signals() as signals:
        job = processes.join(config.train.device, group_for_one=config.engine.kind == "deepspeed")
        try:
            agreement = Agreement()
            with Lease(config.run, agreement=agreement).acquire():
                return _train(config, job, agreement, signals, extra)
        finally:
            processes.leave()


def _train(config: RunConfig, job: Processes, agreement: Agreement, signals: Signals, extra: Sequence[Callback]) -> int:
    mesh = _or_usage(lambda: Mesh(config.mesh, job))
    corpus, validation = open_data(config)
    config = with_vocabulary(config, corpus.vocabulary_size)
    progress = Progress(config.log.every)
    loader = _or_usage(
        lambda: Loader(
            corpus,
            sequence_length=config.data.sequence_length,
            global_batch=config.train.batch,
            micro_batch=config.train.micro_batch,
            seed=config.data.seed,
            rank=mesh.dp_rank,
            ranks=mesh.dp_size,
            prefetch=config.data.prefetch,
        )
    )
    torch.manual_seed(config.train.seed)  # the same initial weights on every rank
    model = build_model(config).to(job.device)
    engine = engines.build(config.engine, model, list(model.blocks), config.optimizer.build, mesh, config.train.clip)
    run = Run(config, job, engine, model)
    checkpoints = Checkpoints(
        config.run / FOLDER,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every or 0,
        agreement=agreement,
    )
    checkpoints.sweep()
    resumed = _or_usage(lambda: restore(run, checkpoints, loader))
    if job.first:
        _write_config(config, corpus)
    # The order matters: balancing completes the record, saving comes after it (the checkpoint holds the moved biases).
    callbacks: list[Callback] = [
        *extra,
        Balance(),
        Metrics(config.log.tensorboard),
        progress,
        Save(checkpoints, loader, progress),
        Validation(validation, progress),
        LossCurve(),
    ]
    try:
        for callback in callbacks:
            callback.on_start(run)
        _announce(run, mesh, resumed, progress)
        return _steps(run, loader, signals, callbacks, progress)
    finally:
        loader.close()
        for callback in callbacks:
            callback.close()


def _steps(run: Run, loader: Loader, signals: Signals, callbacks: list[Callback], progress: Progress) -> int:
    config, job = run.config, run.processes
    nominal, measured = _peaks(run)
    memory = psutil.Process()
    bad_steps = 0
    signals.armed = True
    before = time.perf_counter()
    while not run.last:
        batches = loader.batches(run.step)
        lr = config.optimizer.lr * config.schedule.factor(run.step, config.train.steps)
        result = train_step(run.engine, batches, lr, job, config.train.precision, signals.received is not None)
        run.step += 1
        run.tokens += config.train.batch * config.data.sequence_length
        seconds, before = time.perf_counter() - before, time.perf_counter()
        work = _flops(run.model, batches)
        run.record = {
            "step": run.step,
            "tokens": run.tokens,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "step_seconds": seconds,
            "tokens_per_second": config.train.batch * config.data.sequence_length / seconds,
            "mfu": None if nominal is None else work / seconds / nominal,
            "mfu_measured": work / seconds / measured,
            "memory_bytes": _memory(job, memory),
        }
        bad_steps = 0 if math.isfinite(result.grad_norm) else bad_steps + 1
        if bad_steps:
            progress.say(f"step {run.step}: gradient is not finite, update skipped ({bad_steps} in a row)")
        if bad_steps >= config.train.bad_steps:
            raise Exit(
                f"{bad_steps} steps in a row had a non-finite gradient; the newest checkpoint is kept", NUMERICAL
            )
        if result.flagged:
            run.stop = "preempted"
        for callback in callbacks:
            callback.on_step(run)
    for callback in callbacks:
        callback.on_end(run)
    if run.stop == "preempted":
        progress.say(
            f"stopped by {signals.received or 'a signal on another rank'} after step {run.step}; run again to go on"
        )
        return PREEMPTED
    progress.say(f"finished {run.step} steps; loss curve: {run.folder / 'loss.png'}")
    return FINISHED


def open_data(config: RunConfig) -> tuple[Corpus, Corpus]:
    """(training corpus, validation corpus). Raises DataError for missing or damaged files."""
    data = config.data
    options: Any = {"vocabulary_size": config.model.vocabulary, "tokenizer": data.tokenizer}
    corpus = Corpus.open(data.path, "train", **options)
    if data.validation_path is None and corpus.manifest is None:
        raise ConfigError(
            f"data.path = {data.path} is a bare Megatron pair, which has no validation split; set data.validation_path"
        )
    if data.validation_path is not None:
        return corpus, Corpus.open(data.validation_path, "validation", **options)
    return corpus, Corpus.open(data.path, "validation")


T = TypeVar("T")


def _or_usage(build: Callable[[], T]) -> T:
    """What a ValueError says while the job is being put together is something to correct in the configuration."""
    try:
        return build()
    except ValueError as error:
        if getattr(error, "exit_code", None) is not None:
            raise
        raise ConfigError(str(error)) from None


def build_model(config: RunConfig) -> Decoder:
    """The model of a run. Raises ConfigError for sizes that do not fit."""
    return _or_usage(lambda: Decoder(config.model))


def with_vocabulary(config: RunConfig, tokenizer: int | None) -> RunConfig:
    """The config with model.vocabulary filled in: the tokenizer's size, rounded up to a multiple of 64 for the matrix units."""
    vocabulary = config.model.vocabulary
    if tokenizer is None:
        if vocabulary is None:
            raise ConfigError(
                "model.vocabulary: not set, and the data has no tokenizer to take it from; set one of them"
            )
        return config
    if vocabulary is None:
        return config.model_copy(
            update={"model": config.model.model_copy(update={"vocabulary": -(-tokenizer // 64) * 64})}
        )
    if vocabulary < tokenizer:
        raise ConfigError(
            f"model.vocabulary = {vocabulary}: the data's tokenizer has {tokenizer} tokens; "
            "leave model.vocabulary out, or prepare the data with a smaller vocabulary"
        )
    return config


def _write_config(config: RunConfig, corpus: Corpus) -> None:
    config.run.mkdir(parents=True, exist_ok=True)
    temporary = config.run / ".config.yaml.partial"
    temporary.write_text(configuration.dump(config))
    temporary.replace(config.run / "config.yaml")
    if corpus.tokenizer_path is not None:  # so that the model can be used where the data is not
        shutil.copyfile(corpus.tokenizer_path, config.run / "tokenizer.model")


def _announce(run: Run, mesh: Mesh, resumed: bool, progress: Progress) -> None:
    config, model = run.config, run.model
    total = sum(parameter.numel() for parameter in model.parameters())
    progress.say(
        f"{config.run}: {human(total)} parameters, {human(model.active_parameters())} active; {mesh.picture()}; "
        f"{config.engine.kind} engine, {config.train.precision}; "
        f"{human(config.train.batch * config.data.sequence_length)} tokens a step"
    )
    progress.say(f"resumed after step {run.step}" if resumed else "starting from scratch")


def _peaks(run: Run) -> tuple[float | None, float]:
    """(nominal, measured) FLOP/s of this rank's device."""
    device, precision = run.processes.device, run.config.train.precision
    chip = hardware.read(run.config.hardware) if run.config.hardware else hardware.detect(device)
    return (chip.peak(precision) if chip else None), hardware.measured_peak(device, precision)


def _flops(model: Decoder, batches: Sequence) -> float:
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
