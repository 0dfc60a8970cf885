"""What is taken down of a layer while it is traced: its matrix products and its messages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from pretrain.estimate.memory import Memory

Phase = Literal["forward", "backward"]


@dataclass(frozen=True)
class Message:
    """A collective that a layer takes part in. bytes: S as in costs.Collective; over cp, what one rank brings of it.

    window: over cp, how many columns of each chunk travel; None: all of them, for which `bytes` is given. wide: bytes in fp32.
    """

    axis: str
    op: str
    what: str
    bytes: float
    phase: Phase
    hidden: bool = False
    window: int | None = None
    wide: float = 0.0


@dataclass(frozen=True)
class Product:
    """A matrix product of the forward pass: [rows, k] x [k, n], `count` of them; what: of which module; part: the layer's
    sublayer that makes it (mixer, ffn), or nothing.

    kept: selective recomputation keeps its result.
    """

    what: str
    rows: float
    n: int
    k: int
    count: int
    part: str
    kept: bool = True

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.n * self.k * self.count


@dataclass
class Notes:
    """What is taken down in the course of a layer's forward and backward pass."""

    memory: Memory
    gpu: bool
    phase: Phase = "forward"
    names: list[str] = field(default_factory=list)
    """Of the modules whose forward passes run."""
    routing: Any = None
    """Of the module that runs, where it routes different numbers of experts to its tokens."""
    products: dict[Phase, list[Product]] = field(default_factory=lambda: {"forward": [], "backward": []})
    messages: list[Message] = field(default_factory=list)
    shared: dict[tuple[int, float], int] = field(default_factory=dict)
    """Bytes of rotary tables, which all layers share."""
    rows: int = 0
    """Selected pairs of one expert, where a layer routes different numbers of experts to its tokens."""

    def multiply(self, what: str, rows: float, n: int, k: int, count: int, kept: bool = True) -> None:
        """Takes down a product of the module that runs."""
        part = next((name for name in self.names if name in ("mixer", "ffn")), "")
        self.products[self.phase].append(Product(what, rows, n, k, count, part, kept))

    def send(self, axis: str, op: str, what: str, nbytes: float, **more: Any) -> None:
        """Takes down a message."""
        self.messages.append(Message(axis, op, what, nbytes, self.phase, **more))


def size(x: Tensor) -> int:
    """Bytes."""
    return x.numel() * x.element_size()
