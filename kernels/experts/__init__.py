"""The routed feed-forward of a dropless mixture of experts, given the routing decisions.

    y_n = sum_j scores[n, j] * (act(x_n G_e) * (x_n U_e)) D_e      with e = indices[n, j]

and without gates sum_j scores[n, j] * act(x_n U_e) D_e.

Source: Shazeer et al. 2017 (1701.06538); dropless: Gale et al. 2022 (2211.15841); gated units: Shazeer 2020
(2002.05202).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import Form, Request, choose, triton_objection
from kernels.experts import routing_reference as _loaded  # noqa: F401  torch.compile traces it, and can trace no import
from kernels.experts.activations import ACTIVATIONS
from kernels.experts.routing import ROUTING_FORMS, route

__all__ = ["ACTIVATIONS", "FORMS", "ROUTING_FORMS", "experts", "load", "route"]

FORMS = (
    Form("triton", "kernels.experts.triton", "experts_triton", triton_objection),
    Form("chunked", "kernels.experts.chunked", "experts"),
    Form("reference", "kernels.experts.reference", "experts"),
)


def experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    indices: Tensor,
    scores: Tensor,
    *,
    activation: str = "silu",
) -> Tensor:
    """Each token through the experts chosen for it; no token is dropped, no expert is padded.

    Args:
        x: [N, D] tokens. Its dtype is the dtype of the matrix products, whatever autocast says.
        gate_up: [E, D, 2F], gate columns first, then up; or [E, D, F], experts without gates. Cast to x's dtype inside; its
            gradient comes back in its own.
        down: [E, F, D], likewise.
        indices: int64 [N, k], the expert of each choice, 0 <= indices < E; the same expert may be chosen twice.
        scores: [N, k] combine weights, fp32 in training; differentiable.
        activation: of the gate, or of the hidden layer where there is none; one of ACTIVATIONS.

    Returns y [N, D] in x's dtype. Deterministic: the order of every sum depends on the arguments only.

    Raises ValueError for shapes, dtypes or indices that do not fit, naming the argument.
    """
    _check(x, gate_up, down, indices, scores, activation)
    N, D = x.shape
    E, F, _ = down.shape
    request = Request(
        op="experts",
        device=x.device,
        dtype=x.dtype,
        shape={"N": N, "D": D, "E": E, "F": F, "k": indices.shape[1]},
        options={"activation": activation, "gated": gate_up.shape[2] != F},
    )
    form = choose(FORMS, request).load()
    with torch.autocast(x.device.type, enabled=False):
        return form(x, gate_up, down, indices, scores, activation=activation)


def load(indices: Tensor, experts: int) -> Tensor:
    """int64 [experts]: how many choices fell on each expert. indices: int64 of any shape, 0 <= indices < experts."""
    flat = indices.reshape(-1)
    if flat.device.type == "cpu":
        return torch.bincount(flat, minlength=experts)
    # There bincount waits for the device, to learn the largest value. Sums of integers do not depend on their order.
    return torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def _check(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, scores: Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(
            f"x must be floating point [N, D] (flatten batch and time first), got {x.dtype} {tuple(x.shape)}"
        )
    if down.dim() != 3 or down.shape[2] != x.shape[1]:
        raise ValueError(f"down must be [E, F, D] with D = {x.shape[1]} as in x, got {tuple(down.shape)}")
    E, F, D = down.shape
    if gate_up.shape not in ((E, D, 2 * F), (E, D, F)):
        raise ValueError(
            f"gate_up must be [E, D, 2F] = {(E, D, 2 * F)} to fit down, or {(E, D, F)} for experts without gates, "
            f"got {tuple(gate_up.shape)}"
        )
    if indices.dim() != 2 or indices.shape[0] != x.shape[0] or indices.dtype != torch.int64:
        raise ValueError(
            f"indices must be int64 [N, k] with N = {x.shape[0]}, got {indices.dtype} {tuple(indices.shape)}"
        )
    if scores.shape != indices.shape or not scores.is_floating_point():
        raise ValueError(
            f"scores must be floating point {tuple(indices.shape)} as indices, got {scores.dtype} {tuple(scores.shape)}"
        )
    # The values are read on the CPU only: reading them on a GPU would stall it.
    if indices.device.type == "cpu" and indices.numel():
        low, high = (int(i) for i in indices.aminmax())
        if low < 0 or high >= E:
            raise ValueError(f"indices must lie in 0..{E - 1} (there are {E} experts), got {low if low < 0 else high}")
