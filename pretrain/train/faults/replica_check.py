"""Every few steps: do ranks that hold the same values still hold the same bits? If not, back to a checkpoint."""

from __future__ import annotations

from parallel.replicas import Difference, Replicas
from pretrain.exit import ERROR, NUMERICAL
from pretrain.train.callback import Run
from pretrain.train.faults.events import Events
from pretrain.train.faults.guard import where
from pretrain.train.faults.rewind import Rewind


class ReplicaCheck:
    """Made when the run's state is loaded. Collective, as all its calls."""

    def __init__(self, run: Run, events: Events, rewind: Rewind):
        self.run, self.events, self.rewind = run, events, rewind
        self.every = run.config.faults.replica_check_every
        self.replicas: Replicas | None = None
        if self.every is not None and run.processes.world > 1:
            self.replicas = Replicas(run.engine.replicated(), run.processes)

    @property
    def scope(self) -> str | None:
        """A line for the start of the run."""
        if self.replicas is None:
            return None
        share = f"{100 * self.replicas.covered:.0f}%"
        return f"replica check every {self.every} steps and before saves covers {share} of the parameters"

    def went_back(self, saving: bool) -> bool:
        """After a step: checks if it is time to, and goes back if ranks differ. saving: the step is about to be saved.

        What is saved has passed the check, so every checkpoint is from before the fault. Raises Exit with code 79 when a rank
        differs for the second time within faults.replica_check_every steps.
        """
        run, step = self.run, self.run.step
        if self.replicas is None or self.every is None or not (saving or step % self.every == 0):
            return False
        differences = self.replicas.check(run.engine.replicated())
        if not differences:
            return False
        odd = sorted({rank for difference in differences for rank in difference.odd})
        labels = where(odd, run.processes.world)
        text = _describe(differences, labels)
        known = run.faults.corrupted
        again = [label for label in labels if label in known and step - known[label] <= self.every]
        known.update(dict.fromkeys(labels, step))
        tensors = sorted({difference.name for difference in differences})
        self.events.add(step, "replicas differ", text, where=labels, tensors=tensors[:20], blocks=len(differences))
        if again:
            text = f"{', '.join(again)} differs from its replicas again within {self.every} steps"
            self.events.stop(step, f"{text}; run again without that host", NUMERICAL)
        if not self.rewind.to(step):
            self.events.stop(step, f"{text}. There is no checkpoint yet to go back to; run again", ERROR)
        self.events.add(
            run.step, "back", f"went back from step {step} to the checkpoint of step {run.step}", origin=step
        )
        return True


def _describe(differences: list[Difference], labels: list[str]) -> str:
    first = differences[0]
    more = f" and {len(differences) - 1} more blocks" if len(differences) > 1 else ""
    if all(len(difference.odd) < len(difference.holders) for difference in differences):
        return f"{', '.join(labels)} has other bits than its replicas in {first.name}{more}"
    return f"{', '.join(labels)} hold other bits of {first.name}{more}; with no majority, nothing tells which is right"
