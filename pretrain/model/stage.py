"""One stage of a pipeline: a decoder with some of its layers, called with what the stage before it returns.

Between stages go plain tensors: the residual stream, and of the carry what a later layer needs. Parameters keep the names that
they have in the whole decoder.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain.model.block import Block
from pretrain.model.decoder import Decoder
from pretrain.model.router import Balanced
from pretrain.model.split import Split
from pretrain.model.sublayer import Carry, ContextualFFN


class Stage(Decoder):
    """Stage `index` of those into which `stages` cuts the layers of `whole`, whose modules it shares, under the same names.

    The first stage has the embedding; the last one the final norm, the head and the multi-token layer, and, where one of these
    reads the embedding, a copy of it that starts with the same values: see `shared`.
    """

    def __init__(self, whole: Decoder, stages: Sequence[range], index: int):
        nn.Module.__init__(self)
        own = set(vars(self))
        for name, value in vars(whole).items():
            if name not in own:  # all that is neither a module nor a parameter, such as the config
                setattr(self, name, value)
        self.training = whole.training
        self.first, self.last, layers = index == 0, index == len(stages) - 1, stages[index]
        for name, module in whole.named_children():
            at_the_end = name in ("norm", "head", "multi_token")
            self.register_module(name, module if (self.last if at_the_end else self.first) else None)
        for name, parameter in whole.named_parameters(recurse=False):  # of the embedding
            self.register_parameter(name, parameter if self.first else None)
        # Absent layers leave gaps, so that the others keep their numbers.
        blocks: Any = [block if number in layers else None for number, block in enumerate(whole.blocks)]
        self.blocks = nn.ModuleList(blocks)
        self._dtype = torch.promote_types(whole.embedding.weight.dtype, torch.float32)  # as embed makes the stream
        self._doubled = (self.first or self.last) and (whole.head is None or whole.multi_token is not None)
        if self.last and not self.first and self._doubled:
            self.embedding = copy.deepcopy(whole.embedding)
        self._received, self._sent = (_Border(whole, edge) for edge in (layers.start, layers.stop))

    def forward(  # type: ignore[override]
        self,
        received: tuple[Tensor, ...],
        tokens: Tensor,
        targets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """What the next stage needs, or from the last stage the loss as the decoder's; all as in Decoder.forward.

        received: what the stage before returned, () in the first one. tokens, targets, cu_seqlens: the same in all stages.
        """
        sequence = self.sequence_of(tokens, cu_seqlens)
        x, carry = (self.embed(tokens), Carry()) if self.first else self._received.unpack(received)
        for block in self.layers():
            x, carry = block(x, sequence, None, carry)
        if not self.last:
            return self._sent.pack(x, carry, received)
        assert targets is not None
        return self.objective(x, carry, tokens, targets, sequence)

    def incoming(self, length: int) -> tuple[Tensor, ...]:
        """Tensors without storage that look like `received`. length: tokens of the stream on this rank."""
        return () if self.first else self._received.examples(length, self._dtype)

    def outgoing(self, length: int) -> tuple[Tensor, ...]:
        """Tensors without storage that look like what forward returns."""
        if self.last:
            return (torch.empty((), dtype=self._dtype, device="meta", requires_grad=True),)
        return self._sent.examples(length, self._dtype)

    def shared(self) -> dict[str, nn.Parameter]:
        """Parameters of which the first and the last stage hold a copy each, by name: their gradients belong together."""
        return {"embedding.weight": self.embedding.get_parameter("weight")} if self._doubled else {}

    def splits(self) -> dict[str, Split]:
        here = dict(self.named_parameters())
        return {name: split for name, split in super().splits().items() if name in here}

    def flops_per_token(self, context: float) -> float:
        if self.last:
            return super().flops_per_token(context)
        return sum(part.flops_per_token(context) for part in self.sublayers())


class Stages(nn.Module):
    """The stages of one rank of a pipeline, as one module for optimizers, checkpoints and callbacks; called one by one only.

    Parameters get a prefix by which copies in two stages differ; parallel/layout.py takes it away again (plain_name).
    """

    def __init__(self, stages: Sequence[Stage]):
        super().__init__()
        for number, stage in enumerate(stages):
            self.add_module(f"_stage_{number}", stage)

    def routers(self) -> dict[str, Balanced]:
        """As Decoder.routers, of the layers that are here."""
        stages = cast(Iterable[Stage], self.children())
        return {name: router for stage in stages for name, router in stage.routers().items()}


class _Border:
    """What crosses between layer `edge` - 1 and layer `edge`: x [B, T, D], router_state [B, T, R], auxiliary []."""

    def __init__(self, whole: Decoder, edge: int):
        blocks = [cast(Block, block) for block in whole.blocks]
        later = blocks[edge:] + ([] if whole.multi_token is None else [whole.multi_token.block])
        before, after = _router_width(blocks[:edge]), _router_width(later)
        self.width = whole.config.width
        self.router_width = before if after else 0  # a state that nobody reads stays behind
        self.auxiliary = any(isinstance(block.ffn, ContextualFFN) for block in blocks[:edge])

    def examples(self, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        shapes: list[tuple[int, ...]] = [(1, length, self.width)]
        if self.router_width:
            shapes.append((1, length, self.router_width))
        if self.auxiliary:
            shapes.append(())
        return tuple(torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes)

    def pack(self, x: Tensor, carry: Carry, received: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tensors = [x]
        if self.router_width:
            assert carry.router_state is not None
            tensors.append(carry.router_state)
        if self.auxiliary:
            none = x.new_zeros((), requires_grad=torch.is_grad_enabled())  # layers that could add a loss did not
            tensors.append(none if carry.auxiliary is None else carry.auxiliary)
        # Sent over a wire and cut off from the graph afterwards: in memory of their own, not views, not the inputs themselves.
        taken = {id(tensor) for tensor in received}
        return tuple(
            tensor.to(x.dtype).clone(memory_format=torch.contiguous_format)
            if id(tensor) in taken or tensor._base is not None or not tensor.is_contiguous()
            else tensor.to(x.dtype)
            for tensor in tensors
        )

    def unpack(self, received: tuple[Tensor, ...]) -> tuple[Tensor, Carry]:
        x, *rest = received
        state = rest.pop(0) if self.router_width else None
        auxiliary = rest.pop(0) if self.auxiliary else None
        assert not rest
        return x, Carry(state, auxiliary)


def _router_width(blocks: list[Block]) -> int:
    """Channels of the router state that these layers pass on; 0: none of them routes with one."""
    return max((getattr(block.ffn, "router_width", 0) for block in blocks), default=0)
