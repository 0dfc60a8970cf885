"""The workloads whose cost is matrix products: attention, routed experts, and the loss at the head.

A shape's letters are those of the layer: T tokens of H heads of D, so a model of width H x D. Below each workload, what plain
torch offers in its place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.benching.shapes import Inputs, Shape, Workload, finish, generator_of, normal

GROUP = 4  # query heads that share a key head, where the heads allow it
WINDOW = 512  # tokens that sliding attention sees
EXPERTS, CHOICES = 8, 2


def window(tokens: int) -> int:
    return min(WINDOW, max(1, tokens // 4))


def _attention(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Grouped queries. Random values of a width that makes scores as spread as those of a trained layer."""
    generator = generator_of(device)
    heads = shape.H // GROUP if shape.H % GROUP == 0 else shape.H
    q = normal((shape.B, shape.T, shape.H, shape.K), device, generator).to(dtype)
    k = normal((shape.B, shape.T, heads, shape.K), device, generator).to(dtype)
    v = normal((shape.B, shape.T, heads, shape.V), device, generator).to(dtype)
    return finish({"q": q, "k": k, "v": v})


def _sliding(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    return _attention(shape, dtype, device) | {"window": window(shape.T)}


def _call_attention(inputs: Inputs) -> Tensor:
    from kernels.attention import attention

    return attention(**inputs)


def sdpa(i: Inputs) -> Tensor:
    """torch's fused attention; a sliding window is a mask there."""
    q, k, v = (i[name].transpose(1, 2) for name in ("q", "k", "v"))
    sees = None if i.get("window") is None else _band(q.shape[2], i["window"], q.device)
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=sees, is_causal=sees is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return o.transpose(1, 2)


def written_out(i: Inputs) -> Tensor:
    """Every score in memory, as a first model has it."""
    q, k, v = (i[name].transpose(1, 2) for name in ("q", "k", "v"))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)) * q.shape[3] ** -0.5
    sees = _band(q.shape[2], i.get("window") or q.shape[2], q.device)
    weights = torch.softmax(scores.float().masked_fill(~sees, -torch.inf), dim=-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def _band(tokens: int, width: int, device: torch.device) -> Tensor:
    ones = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    return ones.tril().triu(1 - width)


def _experts(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Fine-grained experts, half as wide as the model; each token goes to two of them, some experts get more than others."""
    generator = generator_of(device)
    N, D = shape.tokens, shape.H * shape.K
    hidden = max(1, D // 2)
    x = normal((N, D), device, generator).to(dtype)
    gate_up = (normal((EXPERTS, D, 2 * hidden), device, generator) * D**-0.5).to(dtype)
    down = (normal((EXPERTS, hidden, D), device, generator) * hidden**-0.5).to(dtype)
    logits = normal((N, EXPERTS), device, generator) + torch.linspace(0, 1, EXPERTS, device=device)
    best, indices = logits.topk(CHOICES, dim=1)
    return finish({"x": x, "gate_up": gate_up, "down": down, "indices": indices, "scores": best.softmax(dim=1)})


def _call_experts(inputs: Inputs) -> Tensor:
    from kernels.experts import experts

    return experts(**inputs)


def expert_loop(i: Inputs) -> Tensor:
    """Expert by expert: the tokens that chose it are gathered, multiplied and added back."""
    x, y = i["x"], torch.zeros_like(i["x"])
    for expert in range(i["down"].shape[0]):
        token, slot = torch.where(i["indices"] == expert)
        gate, up = (x[token] @ i["gate_up"][expert]).chunk(2, dim=1)
        out = (F.silu(gate) * up) @ i["down"][expert]
        y = y.index_add(0, token, out * i["scores"][token, slot, None].to(x.dtype))
    return y


def grouped(i: Inputs) -> Tensor:
    """Tokens sorted by expert, and torch's grouped product over the groups."""
    x, indices = i["x"], i["indices"]
    order = indices.flatten().argsort(stable=True)
    ends = torch.bincount(indices.flatten(), minlength=i["down"].shape[0]).cumsum(0).to(torch.int32)
    token = order // indices.shape[1]
    gate, up = F.grouped_mm(x[token], i["gate_up"], offs=ends).chunk(2, dim=1)
    out = F.grouped_mm(F.silu(gate) * up, i["down"], offs=ends)
    weighted = out * i["scores"].flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, token, weighted)


def _head(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The last hidden states and a vocabulary of 64 times the width, at most 131072."""
    generator = generator_of(device)
    N, D = shape.tokens, shape.H * shape.K
    vocabulary = min(64 * D, 131072)
    x = normal((N, D), device, generator).to(dtype)
    weight = (normal((vocabulary, D), device, generator) * D**-0.5).to(dtype)
    targets = torch.randint(vocabulary, (N,), device=device, generator=generator)
    return finish({"x": x, "weight": weight, "targets": targets})


def _call_head(inputs: Inputs) -> Tensor:
    from kernels.cross_entropy import linear_cross_entropy

    return linear_cross_entropy(**inputs)


def all_logits(i: Inputs) -> Tensor:
    return F.cross_entropy(F.linear(i["x"], i["weight"]).float(), i["targets"])


WORKLOADS = (
    Workload("attention", "attention", _attention, _call_attention),
    Workload("sliding_attention", "attention", _sliding, _call_attention),
    Workload("experts", "experts", _experts, _call_experts),
    Workload("linear_cross_entropy", "cross_entropy", _head, _call_head),
)
