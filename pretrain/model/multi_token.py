"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): one more layer that predicts the token after next.

    h'_t = Block(W [RMSNorm(h_t); RMSNorm(e(x_{t+1}))]),   loss on x_{t+2} through the model's own final norm and head

h_t is the output of the last layer and e the shared embedding. The extra layer serves training only.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from parallel.config import Strict
from pretrain.model.block import Block
from pretrain.model.norm import RMSNorm
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import Carry

IGNORED = -100


class MultiTokenConfig(Strict):
    layer: str
    """The extra layer, `mixer + ffn`, by the names that the pattern uses."""
    weight: float = Field(0.3, gt=0)
    """Its loss counts this much."""


class MultiToken(nn.Module):
    def __init__(self, width: int, norm_eps: float, block: Block):
        super().__init__()
        self.stream_norm = RMSNorm(width, norm_eps)
        self.token_norm = RMSNorm(width, norm_eps)
        self.join = nn.Linear(2 * width, width, bias=False)
        self.block = block

    def forward(
        self, x: Tensor, next_embedding: Tensor, sequence: SequenceContext, carry: Carry
    ) -> tuple[Tensor, Carry]:
        """x, the stream after the last layer, and next_embedding, of the following token: [B, T, D] -> ([B, T, D], carry)."""
        joined = self.join(torch.cat((self.stream_norm(x), self.token_norm(next_embedding)), dim=-1))
        return self.block(joined.to(torch.promote_types(joined.dtype, torch.float32)), sequence, None, carry)
