"""The random streams of a rank: taken down, and set again."""

from __future__ import annotations

import torch


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Torch's random streams of this rank."""
    states = {"rng_cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng_cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_state(states: dict[str, torch.Tensor]) -> None:
    """Sets those streams of `random_state` that are there."""
    for name, restore in (("rng_cpu", torch.set_rng_state), ("rng_cuda", torch.cuda.set_rng_state)):
        if name in states:
            restore(states[name])
