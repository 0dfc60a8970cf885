"""What decisions about faults depend on besides the step itself; it goes into every checkpoint.

A run that is interrupted within a window takes the same decisions as one that is not.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class FaultState:
    """window: [loss, gradient norm] of the latest steps, those that are finite. bad: steps in a row without an update.

    rollbacks: of the run so far. transient: faults gone at the replay, by rank and host. corrupted: the step at which a rank
    (and host) was last found to differ from its replicas.
    """

    window: list[list[float]] = field(default_factory=list)
    bad: int = 0
    rollbacks: int = 0
    transient: dict[str, int] = field(default_factory=dict)
    corrupted: dict[str, int] = field(default_factory=dict)

    def add(self, loss: float, norm: float, length: int) -> None:
        """Takes a step's numbers into the window, also those of a spike: where losses rise for good, the window must follow."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.window = [*self.window, [loss, norm]][-length:]

    def returned_to(self, earlier: FaultState) -> FaultState:
        """The state after going back to a checkpoint: its window, and the counts of the whole run."""
        return FaultState(earlier.window, 0, self.rollbacks, self.transient, self.corrupted)

    def to_meta(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_meta(meta: dict[str, Any] | None) -> FaultState:
        """meta: of a checkpoint; None in one that is older than this."""
        return FaultState() if meta is None else FaultState(**meta)
