"""AdamW for what another optimizer leaves to it: torch's own numbers, and the same count of steps on every rank."""

from __future__ import annotations

import torch

from pretrain.optim.adam import AdamPart


def test_a_rank_without_a_part_counts_steps() -> None:
    """A parameter of which a rank's shard is empty must be saved with the same count by all."""
    torch.manual_seed(0)
    empty, whole, idle = (torch.nn.Parameter(torch.randn(rows, 3)) for rows in (0, 4, 2))
    other = torch.nn.Parameter(whole.detach().clone())
    torchs = torch.optim.AdamW([other], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    part = AdamPart(0.8, 0.9, 1e-3)
    state = {parameter: part.state(parameter) for parameter in (empty, whole, idle)}
    for step in (1, 2):
        empty.grad, whole.grad = torch.zeros(0, 3), torch.randn(4, 3)
        other.grad = whole.grad.clone()
        part.step([empty, whole, idle], state, 0.1, 0.2)
        torchs.step()
        torch.testing.assert_close(whole, other)
        assert [float(state[parameter]["step"]) for parameter in (empty, whole, idle)] == [step, step, 0]
