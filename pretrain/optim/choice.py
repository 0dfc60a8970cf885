"""The optimizers that a run can name: `optimizer.kind`.

Each configuration has `lr`, `check(engine kind)`, which refuses what does not go together, and `factory(whole model, mesh)`,
which gives what makes the optimizer of a rank's part of that model.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pretrain.optim.adamw import AdamWConfig
from pretrain.optim.lamb import LAMBConfig
from pretrain.optim.muon import MuonConfig
from pretrain.optim.sgd import SGDConfig

OptimizerConfig = Annotated[AdamWConfig | MuonConfig | LAMBConfig | SGDConfig, Field(discriminator="kind")]
