"""What a layer is given while it is traced: a sequence, experts, norms and tensor-parallel neighbours that compute nothing, keep
what the real ones keep, and take down the messages that the real ones would send.
"""

from __future__ import annotations

from pretrain.estimate.stand_in.neighbours import connect, cut
from pretrain.estimate.stand_in.notes import Message, Notes, Product
from pretrain.estimate.stand_in.operators import operators
from pretrain.estimate.stand_in.sequence import TracedSequence

__all__ = ["Message", "Notes", "Product", "TracedSequence", "connect", "cut", "operators"]
