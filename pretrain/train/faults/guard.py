"""What becomes of a step: judged before its update, and settled after it. All ranks come to the same answers."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterable

import torch.distributed as dist

from pretrain.exit import NUMERICAL
from pretrain.train.callback import Run
from pretrain.train.faults.events import Events
from pretrain.train.faults.spikes import spike
from pretrain.train.step import Fault, StepResult


class Guard:
    """train_step calls it as its judge; `settle` takes the result and keeps the counts, which are the run's (run.faults)."""

    def __init__(self, run: Run, events: Events):
        self.run, self.events, self.config = run, events, run.config.faults
        self.replay = self.config.replay
        self.witnessed = self.replay and run.engine.watch()

    @property
    def scope(self) -> str | None:
        """A line for the start of the run, where replays cannot tell all that they should."""
        if not self.replay or self.witnessed or self.run.processes.world == 1:
            return None
        return (
            "replays of faulty steps: this engine sums gradients before anybody sees them, so an error of the hardware is told "
            "from bad data, but its rank only where the loss shows it"
        )

    def __call__(self, loss: float, grad_norm: float) -> Fault | None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            what = "gradient" if not math.isfinite(grad_norm) else "loss"
            return Fault("not finite", f"the {what} is not finite", True)
        if self.config.spike == "off":
            return None
        text = spike(self.run.faults.window, loss, grad_norm, self.config)
        return None if text is None else Fault("spike", text, self.config.spike != "warn")

    def settle(self, step: int, result: StepResult) -> bool:
        """step: counted from 1. Returns whether the run must go back because of it.

        Raises Exit with code 79 when it cannot go on: too many steps without an update, or a rank that fails again and again.
        """
        state, fault = self.run.faults, result.fault
        if result.first is not None:
            self._replayed(step, result.first, result)
        if fault is not None and self._policy(fault) == "rollback":
            if state.rollbacks >= self.config.rollbacks:
                text = f"{fault.text}, after {state.rollbacks} rollbacks (faults.rollbacks); the checkpoints are kept"
                self.events.stop(step, text, NUMERICAL)
            return True
        self.keep(step, result)
        return False

    def keep(self, step: int, result: StepResult) -> None:
        """The step stays, with or without its update."""
        state, fault, limit = self.run.faults, result.fault, self.run.config.train.bad_steps
        state.add(result.loss, result.grad_norm, self.config.window)
        state.bad = 0 if result.updated else state.bad + 1
        if fault is None:
            return
        numbers = {"loss": result.loss, "grad_norm": result.grad_norm}
        if result.updated:
            self.events.add(step, "spike", f"{fault.text}; the update is made (faults.spike=warn)", **numbers)
            return
        self.events.add(step, "skip", f"{fault.text}, update skipped ({state.bad} in a row)", **numbers)
        if state.bad >= limit:
            text = (
                f"{state.bad} steps in a row were skipped, in the last one {fault.text}; the newest checkpoint is kept"
            )
            self.events.stop(step, text, NUMERICAL)

    def _policy(self, fault: Fault) -> str:
        return self.config.not_finite if fault.kind == "not finite" else self.config.spike

    def _replayed(self, step: int, first: StepResult, second: StepResult) -> None:
        """Reports on a step that was computed twice, and counts faults that did not come again."""
        assert first.fault is not None
        same = "in the same bits" if not second.changed else f"not in the same bits on rank {_list(second.changed)}"
        numbers = {
            "loss": first.loss,
            "grad_norm": first.grad_norm,
            "replayed_loss": second.loss,
            "replayed_grad_norm": second.grad_norm,
            "changed": list(second.changed),
        }
        if second.fault is not None:
            text = f"{first.fault.text}; computed again it is still so, {same}: data or model, or a lasting defect"
            self.events.add(step, "persistent", text, **numbers)
            return
        if math.isclose(first.loss, second.loss, rel_tol=1e-3) and math.isclose(
            first.grad_norm, second.grad_norm, rel_tol=1e-2
        ):
            # Kernels that add up in another order each time, and a step just at the bar: nobody's fault.
            text = f"{first.fault.text}; computed again it is just below that; the second result is used"
            self.events.add(step, "unsteady", text, **numbers)
            return
        labels = where(second.changed, self.run.processes.world)
        on = ", ".join(labels) or "a rank that nothing tells"
        text = f"{first.fault.text}; computed again it is not: an error of the hardware, on {on}; the second result is used"
        self.events.add(step, "transient", text, where=labels, **numbers)
        if len(labels) == self.run.processes.world > 1:
            return  # nobody can be blamed for what all had
        counts = self.run.faults.transient
        counts.update({label: counts.get(label, 0) + 1 for label in labels})
        often = [label for label in labels if counts[label] >= self.config.transient_limit]
        if often:
            text = f"{', '.join(often)}: {self.config.transient_limit} errors of the hardware in this run"
            self.events.stop(step, f"{text}; run again without that host", NUMERICAL)


def where(ranks: Iterable[int], world: int) -> list[str]:
    """`rank 3 on n1` for each of the ranks. Collective."""
    hosts = [socket.gethostname()] * world
    if world > 1:
        dist.all_gather_object(hosts, socket.gethostname())
    return [f"rank {rank} on {hosts[rank]}" for rank in ranks]


def _list(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))
