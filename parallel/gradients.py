"""What is left to do to the gradients after the backward pass: sums that the engine does not make, and one norm.

Every parameter has holders: the ranks that hold the same values of it. Its gradient is the sum over them of what each computed
from its own tokens, heads or experts.

    whole            all ranks of the pipeline stage: dp x cp, and tp, for there each rank sees other tokens or other heads
    cut over tp      dp x cp; a key head that several tp ranks hold, because it serves query heads of all of them: these too
    cut over ep      edp

The engine sums over dp x cp, except experts that are cut over ep: it shards those over edp (then that sum is made, too) or leaves
them alone. The rest is summed here, and only here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from parallel.layout import Box, Cuts, boxes, cuts, local
from parallel.state import named_parameters

if TYPE_CHECKING:
    from parallel.mesh import Mesh

BUCKET = 1 << 25  # bytes reduced at a time: large enough to be fast, small beside the gradients


class _Held(NamedTuple):
    """A parameter, how it is cut, the blocks of its own tensor, and how many ranks of all hold it where nothing is shared."""

    name: str
    parameter: nn.Parameter
    cuts: Cuts
    boxes: list[Box]
    holders: float


class GradientRule:
    """For a model on a mesh, sharded or wrapped by its engine already.

    stages: how many pipeline stages hold a parameter of this name, where more than one does (a tied embedding).
    only: names of the parameters to look after; all when left out. bucket: bytes reduced in one call, at least.
    Collective: all ranks of a pipeline stage call `reduce`, all ranks of the job `clip`.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        stages: Mapping[str, int] | None = None,
        only: Collection[str] | None = None,
        bucket: int = BUCKET,
    ):
        self.mesh, self.bucket = mesh, bucket
        table = cuts(model)
        self.held: list[_Held] = []
        for name, parameter in named_parameters(model):
            if parameter.requires_grad and (only is None or name in only):
                each = table.get(name, ())
                parts = _shards(parameter) * math.prod(cut.ranks for cut in each)
                holders = mesh.size("dp_cp_tp") / parts * (stages or {}).get(name, 1)
                self.held.append(_Held(name, parameter, each, boxes(parameter, each), holders))
        self.checked = False

    def reduce(self) -> None:
        """Sums gradients over those holders that the engine has not summed over. In place."""
        if self.mesh.size("dp_cp_tp") == 1:
            return
        self._check_presence()
        over_tp: list[Tensor] = []
        over_edp: list[Tensor] = []
        slots: list[tuple[Tensor, Tensor]] = []  # (a block of a gradient, its place among the blocks of all tp ranks)
        for held, gradient in self._gradients():
            if any(cut.axis == "ep" for cut in held.cuts):
                if not isinstance(held.parameter, DTensor):
                    over_edp.append(gradient)
            elif not held.cuts:
                over_tp.append(gradient)
            else:
                for box in held.boxes:
                    if box.copies > 1:
                        (cut,) = (cut for cut in held.cuts if cut.axis == "tp")
                        block = box.of(gradient)
                        all_blocks = block.new_zeros(cut.ranks // box.copies, *block.shape)
                        slots.append((block, all_blocks[cut.rank // box.copies].copy_(block)))
                        over_tp.append(all_blocks)
        _sum_in_buckets(over_tp, self.mesh.group("tp"), self.bucket)
        _sum_in_buckets(over_edp, self.mesh.group("edp"), self.bucket)
        for block, total in slots:
            block.copy_(total)

    def clip(self, max_norm: float | None) -> float:
        """The norm of the gradient of all parameters of the job, each element counted once; the same number on every rank.

        Then scales the gradients in place to a norm of at most max_norm, unless the norm is not finite: such a step is skipped.
        """
        blocks, holders = [], []
        gradients = list(self._gradients())
        for held, gradient in gradients:
            if all(box.copies == 1 for box in held.boxes):
                blocks.append(gradient)
                holders.append(held.holders)
            else:
                blocks += [box.of(gradient) for box in held.boxes]
                holders += [held.holders * box.copies for box in held.boxes]
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.processes.device)
        if blocks:
            norms = torch.stack([norm.double() for norm in torch._foreach_norm(blocks)])
            total += (norms.square() / norms.new_tensor(holders)).sum()
        norm = math.sqrt(value) if (value := float(self.mesh.processes.sum_(total))) >= 0 else math.nan
        if max_norm is not None and math.isfinite(norm):
            factor = max_norm / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_
            if factor < 1.0 and gradients:
                torch._foreach_mul_([gradient for _, gradient in gradients], factor)
        return norm

    def _gradients(self) -> Iterator[tuple[_Held, Tensor]]:
        """Every gradient there is, as this rank's own tensor."""
        for held in self.held:
            if held.parameter.grad is not None:
                yield held, local(held.parameter.grad)

    def _check_presence(self) -> None:
        """Once: the ranks of a stage must agree on which gradients there are, or they would add up different ones."""
        if self.checked:
            return
        present = torch.tensor([h.parameter.grad is not None for h in self.held], device=self.mesh.processes.device)
        counts = present.int()
        dist.all_reduce(counts, group=self.mesh.group("dp_cp_tp"))
        ranks = self.mesh.size("dp_cp_tp")
        some = [held.name for held, count in zip(self.held, counts.tolist()) if 0 < count < ranks]
        if some:
            raise RuntimeError(f"only some ranks of the stage have a gradient of: {', '.join(some[:5])}")
        self.checked = True


def sum_gradients(model: nn.Module, mesh: Mesh, bucket: int = BUCKET) -> None:
    """What an engine does that shards nothing: sums gradients over dp x cp, those of experts that are spread over ranks apart.

    bucket: bytes summed in one call, at least.
    """
    table = cuts(model)
    gradients = [
        parameter.grad
        for name, parameter in named_parameters(model)
        if parameter.grad is not None and not any(cut.axis == "ep" for cut in table.get(name, ()))
    ]
    _sum_in_buckets(gradients, mesh.group("dp_cp"), bucket)


def _shards(parameter: nn.Parameter) -> int:
    """Into how many parts the engine has cut a parameter."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh, placements = parameter.device_mesh, parameter.placements
    return math.prod(mesh.size(i) for i, placement in enumerate(placements) if isinstance(placement, Shard))


def _sum_in_buckets(tensors: list[Tensor], group: dist.ProcessGroup | None, bucket_bytes: int) -> None:
    """All-reduces the tensors in place, many in one call."""
    if group is None:
        return
    for bucket in _buckets(tensors, bucket_bytes):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat, group=group)
        for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
            tensor.copy_(total.view_as(tensor))


def _buckets(tensors: list[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same in by_dtype.values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in same:
            bucket.append(tensor)
            size += tensor.numel() * tensor.element_size()
            if size >= bucket_bytes:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket
