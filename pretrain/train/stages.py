"""What the data's stages change besides the data: the rope base of the model; and whether the job can run all of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from parallel.grid import Grid
from pretrain.config import ConfigError, RunConfig
from pretrain.data.loader import Loader
from pretrain.data.stages import Stage, stages_of
from pretrain.model.files import empty
from pretrain.train import layout
from pretrain.train.callback import Callback, Run
from pretrain.train.progress import Progress


class Stages(Callback):
    """The rope base is that of the next step: in the first validation after a border, and in a checkpoint made there, too."""

    def __init__(self, loader: Loader, progress: Progress):
        self.loader, self.progress = loader, progress
        self.own: list[tuple[Any, float]] = []
        self.stage: Stage | None = None

    def on_start(self, run: Run) -> None:
        self.own = [(module, module.rope_theta) for module in rotating(run.model)]
        self._enter(run, self.loader.stage(run.step))

    def on_step(self, run: Run) -> None:
        stage = self.loader.stage(run.step)
        if stage is not self.stage:
            self._enter(run, stage)
            self.progress.say(f"step {run.step}: from here on {describe(stage)}")

    def on_rewind(self, run: Run) -> None:
        self._enter(run, self.loader.stage(run.step))

    def _enter(self, run: Run, stage: Stage) -> None:
        self.stage = stage
        for module, own in self.own:
            module.rope_theta = own if stage.rope_theta is None else stage.rope_theta


def rotating(model: nn.Module) -> list[Any]:
    """The mixers that have a rotary position embedding."""
    return [module for module in model.modules() if isinstance(getattr(module, "rope_theta", None), float)]


def describe(stage: Stage) -> str:
    rope = "" if stage.rope_theta is None else f", rope base {stage.rope_theta:g}"
    blend = f", weights {' : '.join(f'{weight:g}' for weight in stage.weights)}" if len(stage.weights) > 1 else ""
    return f"{stage.batch} sequences of {stage.sequence_length} tokens a step{blend}{rope}"


def check(config: RunConfig, grid: Grid) -> None:
    """Whether this layout of ranks can run every stage. Needs no processes. Raises ConfigError naming the stage."""
    try:
        stages = stages_of(config.data, config.train.batch, config.train.micro_batch)
        if len(stages) == 1:
            return
        vocabulary = config.model.vocabulary or 64 * grid.tp
        model = empty(config.model.model_copy(update={"vocabulary": vocabulary}))
        if any(stage.rope_theta is not None for stage in stages) and not rotating(model):
            raise ConfigError(
                "data.stages: rope_theta is given, and no mixer of the model has a rotary position embedding"
            )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for number, stage in enumerate(stages[1:]):
        try:
            data = config.data.model_copy(update={"sequence_length": stage.sequence_length})
            train = config.train.model_copy(update={"batch": stage.batch, "micro_batch": stage.micro_batch})
            at = config.model_copy(update={"data": data, "train": train})
            layout.check_batch(at, grid)
            layout.check_cuts(at, grid, model)
            if grid.pp > 1:
                layout.plan(config, model).check(stage.batch // (grid.dp * stage.micro_batch))
        except ValueError as error:
            raise ConfigError(f"data.stages.{number}: {error}") from None
