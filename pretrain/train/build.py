"""Putting a training job together: data, model, engine, and the newest checkpoint's content in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import nn

from parallel import engines
from parallel.engines import Engine, TorchConfig
from parallel.mesh import Mesh
from parallel.processes import Processes
from parallel.state import model_tensors
from pretrain import config as configuration
from pretrain.checkpoint.agreement import Agreement
from pretrain.checkpoint.errors import NoLoadableCheckpoint
from pretrain.checkpoint.folder import META
from pretrain.checkpoint.interop.plain import differences, plain
from pretrain.checkpoint.interop.source import model_config, newest
from pretrain.checkpoint.lifecycle import Checkpoints
from pretrain.checkpoint.near.tier import Tier
from pretrain.checkpoint.storage import read
from pretrain.config import ConfigError, RunConfig
from pretrain.data.loader import Loader
from pretrain.data.opening import Source, loader_of, open_sources, open_validation
from pretrain.data.store import Corpus
from pretrain.data.tokenizer import install
from pretrain.model.decoder import Decoder
from pretrain.model.stage import Stage, Stages
from pretrain.train import heartbeat, layout
from pretrain.train.callback import Run
from pretrain.train.near import open_tier
from pretrain.train.save import FOLDER, restore


@dataclass
class Assembled:
    """A job ready to step. resumed: whether a checkpoint was loaded."""

    run: Run
    mesh: Mesh
    loader: Loader
    checkpoints: Checkpoints
    near: Tier | None
    validation: dict[str, Corpus]
    resumed: bool


def assemble(config: RunConfig, job: Processes, agreement: Agreement) -> Assembled:
    """Builds everything and goes to the newest good checkpoint, if there is one. Collective.

    Raises ConfigError for what the configuration gets wrong, DataError for missing or damaged data, NoLoadableCheckpoint.
    """
    mesh = or_usage(lambda: Mesh(config.mesh, job))
    heartbeat.phase("data")
    corpora = open_sources(config.data, config.model.vocabulary)
    validation = open_validation(config.data, corpora)
    config = with_vocabulary(config, corpora[0].vocabulary_size)
    loader = or_usage(
        lambda: loader_of(
            config.data,
            corpora,
            config.train.batch,
            config.train.micro_batch,
            mesh.dp_rank,
            mesh.dp_size,
            prefetch=config.data.prefetch,
            workers=config.data.workers,
            pin=job.device.type == "cuda",
        )
    )
    checkpoints = Checkpoints(
        config.run / FOLDER,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every or 0,
        strict=config.checkpoint.strict,
        agreement=agreement,
    )
    heartbeat.phase("model")
    near = open_tier(config, job, mesh, checkpoints)
    engine = _first_engine(config, job, mesh, None if _begun(checkpoints, near) else config.train.initial, agreement)
    run = Run(config, job, engine, cast(Decoder | Stages, engine.model))
    checkpoints.sweep()
    resumed = or_usage(lambda: restore(run, checkpoints, loader, near=near))
    if job.first:
        _write_config(config, corpora[0])
    return Assembled(run, mesh, loader, checkpoints, near, validation, resumed)


def _begun(checkpoints: Checkpoints, near: Tier | None) -> bool:
    """Whether the run has something to go on from. Raises NoLoadableCheckpoint if it had."""
    try:
        return checkpoints.newest() is not None
    except NoLoadableCheckpoint:
        if near is None:
            raise
        return True  # near memory may have more than these checkpoints; if not, `restore` raises it again


def _first_engine(config: RunConfig, job: Processes, mesh: Mesh, initial: Path | None, agreement: Agreement) -> Engine:
    """With initial weights. The whole model, of which this rank may keep a part only, is gone afterwards."""
    torch.manual_seed(config.train.seed)  # the same initial weights on every rank
    model = build_model(config).to(job.device)
    if initial is not None:
        # Before the engine, which may copy or cut the weights.
        lines = or_usage(lambda: start_from(initial, model, agreement))
        if job.first:
            print("\n".join(lines), flush=True)
    return or_usage(lambda: engine_for(config, mesh, model))


def engine_for(config: RunConfig, mesh: Mesh, model: Decoder) -> Engine:
    """The engine for this rank's part of a whole model, the same on all ranks; it takes the model apart. Collective.

    Its `model` is the part, under the whole model's names: a decoder, or with mesh.pp the rank's stages. Raises ValueError for
    what cannot be cut so (see layout.check, which needs no processes).
    """
    config.optimizer.check(config.engine.kind)
    optimizer = config.optimizer.factory(model, mesh)  # while the model is whole
    if mesh.size("pp") == 1:
        layout.apply(model, config, mesh)
        return engines.build(config.engine, model, list(model.blocks), optimizer, mesh, config.train.clip)
    from parallel.engines.pipelined import PipelinedEngine  # see layout.plan

    assert isinstance(config.engine, TorchConfig)
    plan = layout.plan(config, model)
    stages = [Stage(model, plan.layers, index) for index in plan.held_by(mesh.rank("pp"))]
    for stage in stages:
        layout.apply(stage, config, mesh)
    blocks: list[list[nn.Module]] = [list(stage.layers()) for stage in stages]
    return PipelinedEngine(config.engine, Stages(stages), blocks, plan, optimizer, mesh, config.train.clip)


def start_from(path: Path, model: Decoder, agreement: Agreement) -> list[str]:
    """Fills the model, on every rank, with the weights of a run, a checkpoint or an imported folder. Collective.

    Returns lines to print: where the weights come from, and in what the model they were trained in computes something else.
    Raises ValueError naming the tensors that do not fit.
    """
    entry = agreement.decide(f"looking for train.initial = {path}", lambda: newest(path))
    try:
        read(entry.path, model_tensors(model), agreement, cast_dtype=True)
    except ValueError as error:
        faults = [line for line in str(error).splitlines() if line.startswith("  ")]
        raise ValueError(
            "\n".join([f"train.initial = {path} holds another model than this configuration:", *faults])
            + f"\nTake the model section from {entry.path / META}, or leave train.initial out."
        ) from None
    ours, theirs = plain(model.config), plain(model_config(entry))
    others = differences(ours, theirs, "it") if len(ours.layers) == len(theirs.layers) else []
    return [f"initial weights: {entry.path}", *(f"  unlike there, {line}" for line in others)]


T = TypeVar("T")


def or_usage(build: Callable[[], T]) -> T:
    """What a ValueError says while the job is being put together is something to correct in the configuration."""
    try:
        return build()
    except ValueError as error:
        if getattr(error, "exit_code", None) is not None:
            raise
        raise ConfigError(str(error)) from None


def build_model(config: RunConfig) -> Decoder:
    """The model of a run. Raises ConfigError for sizes that do not fit."""
    return or_usage(lambda: Decoder(config.model))


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


def _write_config(config: RunConfig, corpus: Source) -> None:
    config.run.mkdir(parents=True, exist_ok=True)
    temporary = config.run / ".config.yaml.partial"
    temporary.write_text(configuration.dump(config))
    temporary.replace(config.run / "config.yaml")
    if corpus.tokenizer_path is not None:  # so that the model can be used where the data is not
        install(corpus.tokenizer_path, config.run)
