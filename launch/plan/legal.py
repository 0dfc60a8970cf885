"""Which layouts a run would accept: asked of the code that the run itself asks (pretrain/train/layout.py), and remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from parallel.grid import Grid
from pretrain.config import RunConfig
from pretrain.model.decoder import Decoder
from pretrain.train import layout


def divisors(number: int) -> list[int]:
    """In order; quick for any number of GPUs."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


@dataclass
class Legality:
    """Answers for one model. What the model allows depends on few of a layout's numbers, so it is asked once for each."""

    model: Decoder
    _known: dict[tuple[Any, ...], str | None] = field(default_factory=dict)

    def refusal(self, config: RunConfig, grid: Grid) -> str | None:
        """Why the run would end with this layout before it began; None if it would not."""
        try:
            layout.check_batch(config, grid)
        except ValueError as error:
            return str(error)
        return self.of_model(config, grid)

    def of_model(self, config: RunConfig, grid: Grid) -> str | None:
        """The parts of layout.check_model, each asked once for what it looks at."""
        mesh, train = config.mesh, config.train
        try:
            layout.check_engine(config, grid)
        except ValueError as error:
            return str(error)
        if grid.pp > 1:
            micro_batches = max(1, train.batch // (grid.dp * train.micro_batch))
            each_time = getattr(config.engine, "reduce_each_micro_batch", False)
            stages = (grid.pp, mesh.pp_schedule, mesh.pp_virtual, tuple(mesh.pp_layers or ()), micro_batches)
            reason = self._remembered(
                ("pipeline", *stages, each_time, train.compile, config.data.sequence_length),
                lambda: layout.check_pipeline(config, self.model, grid),
            )
            if reason is not None:
                return reason
        cuts = (grid.tp, grid.cp, grid.ep, grid.expert_tensor)
        length = config.data.sequence_length * train.micro_batch if grid.tp > 1 or grid.cp > 1 else 0
        return self._remembered(("cuts", *cuts, length), lambda: layout.check_cuts(config, grid, self.model))

    def _remembered(self, key: tuple[Any, ...], check: Callable[[], object]) -> str | None:
        if key not in self._known:
            try:
                check()
                self._known[key] = None
            except ValueError as error:
                self._known[key] = str(error)
        return self._known[key]


def grids(world: int, sizes: dict[str, list[int]]) -> Iterator[tuple[int, int, int, int]]:
    """(pp, dp, cp, tp) of product `world`, from the allowed sizes of pp, cp and tp; dp is what they leave."""
    for pp in sizes["pp"]:
        if world % pp:
            continue
        for tp in sizes["tp"]:
            if world // pp % tp:
                continue
            for cp in sizes["cp"]:
                if world // pp // tp % cp == 0:
                    yield pp, world // (pp * tp * cp), cp, tp
