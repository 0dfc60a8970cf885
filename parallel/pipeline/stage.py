"""torch's pipeline stage with three changes.

Micro-batches reach the module by their number: a stage is called with (received tensors, tokens, targets, cu_seqlens), and
torch sees only the tensors that gradients flow through. Receive buffers live from the receive to the pass that reads them: torch
makes one for every micro-batch of a step and keeps them all. Autocast is on in the forward passes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from parallel.pipeline.deferred import WeightGradients
from parallel.ranges import named


class MicroBatch(Protocol):
    """tokens, targets: int64 [1, T]; cu_seqlens: int32 [N + 1]."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def cu_seqlens(self) -> Tensor: ...


Context = Callable[[], AbstractContextManager[Any]]


def call(module: nn.Module, received: tuple[Tensor, ...], batch: MicroBatch, context: Context) -> Any:
    """A stage's forward pass: its tensors for the next stage, or the last stage's loss."""
    with context():
        return module(received, batch.tokens, targets=batch.targets, cu_seqlens=batch.cu_seqlens)


class Stage(PipelineStage):
    batches: Sequence[MicroBatch] = ()

    def __init__(
        self,
        part: Any,
        index: int,
        count: int,
        device: torch.device,
        group: dist.ProcessGroup | None,
        length: int,
        context: Context,
        deferred: WeightGradients | None,
    ):
        super().__init__(
            part,
            index,
            count,
            device,
            input_args=part.incoming(length),
            output_args=part.outgoing(length),
            group=group,
            dw_builder=None if deferred is None else deferred.take,
        )
        self.context = context

    def begin(self, batches: Sequence[MicroBatch]) -> None:
        """Called before the micro-batches of a step."""
        self.batches, self.has_backward = batches, True
        self.clear_runtime_states()

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self._batch = self.batches[fwd_chunk_id]
        with named("forward"):
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self._forget(self.args_recv_info[fwd_chunk_id])  # the graph has the tensors
        self.output_chunks.clear()  # losses, whose graphs would outlive their backward passes here
        return output

    def forward_maybe_with_nosync(self, *received: Tensor, **_: Any) -> Any:
        return call(self.submod, received, self._batch, self.context)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        with named("backward"):
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        self._forget(self.grad_recv_info[bwd_chunk_id])

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        with named("backward"):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_memory():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_memory():
            return super()._prepare_backward_infra(*args, **kwargs)

    @contextmanager
    def _without_memory(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._move(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self._move(self.grad_recv_info[bwd_chunk_id], self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _forget(self, buffers: Any) -> None:
        self._move(buffers, torch.device("meta"))

    @staticmethod
    def _move(infos: Any, device: torch.device) -> None:
        """Puts fresh, unfilled buffers on the device in place of those that there are."""
        for info in infos:
            buffer = getattr(info, "buffer", None)  # the first stage's inputs have none
            if buffer is not None:
                info.buffer = torch.empty_like(buffer, device=device, requires_grad=buffer.requires_grad)
