"""From router logits to decisions: scores, choice, combine weights.

    s = softmax(z) or sigmoid(z);  chosen: the k largest s + bias;  weights: scale * s, or scale * s / (sum of the chosen)

The bias balances loads (Wang et al. 2024, 2408.15664): it decides who is chosen, never how much the chosen weigh, and gets no
gradient. Groups: DeepSeek-V3 (2412.19437), section 2.1.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dispatch import Form, Request, choose, eager_objection, triton_objection

GATES = ("softmax", "sigmoid")
SMALL = 1e-20  # keeps a sum of vanished scores from dividing by zero


@dataclass(frozen=True)
class Rule:
    """How logits become decisions; see `route`."""

    top_k: int
    gate: str
    normalize: bool
    scale: float
    groups: int
    top_groups: int


def _triton_why_not(request: Request) -> str | None:
    objection = triton_objection(request)
    E, groups = request.shape["E"], request.options["groups"]
    if objection is None and groups > 1 and E & (E - 1):
        return f"groups are halved down to experts in registers: {E} experts are no power of two"
    return objection


ROUTING_FORMS = (
    Form("triton", "kernels.experts.triton_routing", "route_triton", _triton_why_not),
    Form("chunked", "kernels.experts.routing_chunked", "route_chunked", eager_objection),
    Form("reference", "kernels.experts.routing_reference", "route_reference"),
)


def route(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int,
    gate: str = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """(indices int64 [N, k], scores [N, k] in logits' dtype): each token's experts, the most preferred first.

    Args:
        logits: [N, E], fp32 in training: a rounded logit would choose another expert. Differentiable.
        bias: [E], added to the scores for the choice alone; or None.
        top_k: experts a token.
        gate: how logits become scores, one of GATES.
        normalize: the scores of the chosen sum to `scale`; otherwise they are `scale` times what they were among all.
        groups, top_groups: experts lie in equal groups of neighbours, and only the top_groups groups whose two best experts
            have the largest sum of score and bias may be chosen from.

    Among equals the first is chosen where top_k is 1, any of them otherwise. Raises ValueError for arguments that do not fit.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point [N, E], got {logits.dtype} {tuple(logits.shape)}")
    E = logits.shape[1]
    if bias is not None and bias.shape != (E,):
        raise ValueError(f"bias must be [E] = {(E,)} as in logits, got {tuple(bias.shape)}")
    if gate not in GATES:
        raise ValueError(f"gate={gate!r} is unknown; choose one of {', '.join(GATES)}")
    if E % groups or not 1 <= top_groups <= groups or (groups > top_groups and E // groups < 2):
        raise ValueError(
            f"groups={groups}, top_groups={top_groups} do not fit {E} experts: groups must be equal, of two or more"
        )
    if not 1 <= top_k <= E // groups * top_groups:
        raise ValueError(f"top_k={top_k} must lie in 1..{E // groups * top_groups}, the experts that may be chosen")
    rule = Rule(top_k, gate, normalize, scale, groups if groups > top_groups else 1, top_groups)
    request = Request(
        op="experts_routing",
        device=logits.device,
        dtype=logits.dtype,
        shape={"N": logits.shape[0], "E": E, "k": top_k},
        options={"gate": gate, "groups": rule.groups},
    )
    form = choose(ROUTING_FORMS, request).load()
    with torch.autocast(logits.device.type, enabled=False):
        indices, scores = form(logits, None if bias is None else bias.detach(), rule)
    return indices, scores
