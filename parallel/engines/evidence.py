"""What this rank alone computed in a step: the norms of its gradients before any sum over ranks.

After the sums every rank has the same wrong gradient and nobody can tell whose it was. When a step is computed twice, the ranks
whose own numbers differ from the first time are those that the fault was on, or that were given its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Evidence:
    """Costs a read of what it sees. Nothing waits for it: the numbers are fetched when somebody asks."""

    def __init__(self) -> None:
        self._coming: list[Tensor] = []
        self._latest: list[Tensor] = []

    @torch.no_grad()
    def see(self, gradients: Sequence[Tensor]) -> None:
        """Takes down the norms of this rank's own gradients."""
        if gradients:
            self._coming.append(torch.stack([norm.double() for norm in torch._foreach_norm(list(gradients))]))

    def close(self) -> None:
        """Ends a step: what comes from here on belongs to the next."""
        self._latest, self._coming = self._coming, []

    def bits(self) -> bytes:
        """What was seen in the step that was closed last, to be compared bit by bit: a NaN equals itself."""
        return torch.cat(self._latest).cpu().numpy().tobytes() if self._latest else b""


class WatchedReduceScatter:
    """FSDP2's own reduce-scatter (see FSDPModule.set_custom_reduce_scatter), which lets `evidence` see what this rank puts in."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        # torch < 2.12 has it under its older name only.
        self.reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        self.evidence.see([input_tensor])
        return self.reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
