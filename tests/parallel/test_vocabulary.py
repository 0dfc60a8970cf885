"""Embedding and head with the vocabulary shared out, against the kernel that has all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels import linear_cross_entropy
from parallel.vocabulary import VocabularyEmbedding, VocabularyReadout, vocabulary_cross_entropy
from tests.ranks import run_ranks

B, T, D, V = 2, 12, 6, 40
OPTIONS: list[dict[str, Any]] = [
    {},
    {"z_loss": 0.3},
    {"label_smoothing": 0.2, "z_loss": 0.01},
    {"chunk": 5},
    {"chunk": 1},
    {"ignore_index": 7},
]


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, T, D], weight [V, D], targets [B, T] with some ignored."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    weight = 3 * torch.randn(V, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, V, (B, T), generator=generator)
    targets[0, 3:6] = -100
    targets[1, 0] = 7
    return x.to(dtype), weight.to(dtype), targets


def aims(options: dict[str, Any], targets: Tensor) -> Tensor:
    return targets.masked_fill(targets == -100, options.get("ignore_index", -100))


def mine(rank: int, world: int, *parts: tuple[Tensor, int]) -> list[Tensor]:
    """This rank's slice of each tensor along the dim beside it, ready for a gradient."""
    return [tensor.chunk(world, dim)[rank].clone().requires_grad_() for tensor, dim in parts]


def losses(rank: int, world: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    found = []
    for options in OPTIONS:
        x, weight, targets = data()
        x, weight = mine(rank, world, (x, 1), (weight, 0))
        loss = vocabulary_cross_entropy(x, weight, aims(options, targets), dist.group.WORLD, **options)
        (0.25 * loss).backward()
        found.append((loss.detach(), x.grad, weight.grad))
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_loss_and_gradients_are_those_of_the_whole_head(world: int) -> None:
    ranks = run_ranks(losses, world)
    for index, options in enumerate(OPTIONS):
        x, weight, targets = data()
        x.requires_grad_(), weight.requires_grad_()
        chosen = {key: value for key, value in options.items() if key != "chunk"}
        whole = linear_cross_entropy(
            x.flatten(0, 1), weight, aims(options, targets).flatten(), reduction="sum", **chosen
        )
        (0.25 * whole).backward()
        total, dx, dw = zip(*(rank[index] for rank in ranks))
        torch.testing.assert_close(sum(total), whole.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.cat(dx, 1), x.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(torch.cat(dw, 0), weight.grad, rtol=1e-10, atol=1e-12)


def of_each_rank(rank: int, world: int) -> Tensor:
    x, weight, targets = data()
    x, weight = mine(rank, world, (x, 1), (weight, 0))
    return vocabulary_cross_entropy(x, weight, targets, dist.group.WORLD).detach()


def test_a_rank_returns_the_loss_of_its_own_tokens() -> None:
    x, weight, targets = data()
    for rank, loss in enumerate(run_ranks(of_each_rank, 2)):
        own = slice(rank * T // 2, (rank + 1) * T // 2)
        expected = linear_cross_entropy(x[:, own].flatten(0, 1), weight, targets[:, own].flatten(), reduction="sum")
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def in_bf16(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Large logits in half precision, weights in fp32, as under autocast; a second backward; no gradients, no buffers."""
    x, weight, targets = data(torch.float32)
    x, weight = mine(rank, world, (x * 20, 1), (weight, 0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = vocabulary_cross_entropy(x.bfloat16(), weight, targets, dist.group.WORLD)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    with torch.no_grad():
        again = vocabulary_cross_entropy(x.bfloat16(), weight, targets, dist.group.WORLD)
    torch.testing.assert_close(weight.grad, 2 * once, rtol=0, atol=0)
    return loss.detach(), x.grad / 2, once, torch.equal(again, loss)


def test_half_precision_rounds_as_the_kernel_does() -> None:
    ranks = run_ranks(in_bf16, 2)
    x, weight, targets = data(torch.float32)
    low = (x * 20).bfloat16().flatten(0, 1).requires_grad_()
    weight.requires_grad_()
    whole = linear_cross_entropy(low, weight, targets.flatten(), reduction="sum")
    whole.backward()
    assert all(rank[3] for rank in ranks)
    torch.testing.assert_close(ranks[0][0] + ranks[1][0], whole.detach(), rtol=1e-5, atol=0)
    dw = torch.cat([rank[2] for rank in ranks])
    torch.testing.assert_close(dw, weight.grad, rtol=1e-2, atol=1e-3 * weight.grad.abs().max().item())
    dx = torch.cat([rank[1] for rank in ranks], 1).flatten(0, 1)
    torch.testing.assert_close(dx, low.grad.float(), rtol=2e-2, atol=2e-2)


def embeds(rank: int, world: int) -> tuple[Tensor, Tensor, list[str]]:
    _, table, tokens = data()
    whole = nn.Embedding.from_pretrained(table, freeze=False)
    embedding = VocabularyEmbedding(whole, table.chunk(world)[rank].clone(), rank, dist.group.WORLD)
    y = embedding(tokens.clamp(min=0))
    (y * (1 + torch.arange(T * D).view(T, D).chunk(world)[rank])).sum().backward()
    messages = []
    for bad in (lambda: embedding(tokens[:, :-1].clamp(min=0)),):
        with pytest.raises(ValueError) as error:
            bad()
        messages.append(str(error.value))
    return y.detach(), embedding.weight.grad, messages


def test_embedding() -> None:
    ranks = run_ranks(embeds, 4)
    _, table, tokens = data()
    whole = nn.Embedding.from_pretrained(table, freeze=False)
    y = whole(tokens.clamp(min=0))
    (y * (1 + torch.arange(T * D).view(T, D))).sum().backward()
    assert torch.equal(torch.cat([rank[0] for rank in ranks], 1), y)
    torch.testing.assert_close(torch.cat([rank[1] for rank in ranks]), whole.weight.grad)
    assert "a row of 11 tokens on this rank cannot be cut over mesh.tp=4" in ranks[0][2][0]


def reads(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, _ = data()
    x, weight = mine(rank, world, (x, 1), (weight, 0))
    readout = VocabularyReadout(dist.group.WORLD)
    logits = readout.logits(x, weight, False)
    (logits.square().sum() / world).backward()
    return logits.detach(), readout.logits(x, weight, True).detach(), weight.grad


def test_logits_are_whole_on_every_rank() -> None:
    x, weight, _ = data()
    weight.requires_grad_()
    logits = (x @ weight.T).float()
    logits.square().sum().backward()
    ranks = run_ranks(reads, 2)
    for found, last, _ in ranks:
        torch.testing.assert_close(found, logits.detach())
        assert torch.equal(last, found[:, -1:])
    torch.testing.assert_close(torch.cat([rank[2] for rank in ranks]), weight.grad, rtol=1e-5, atol=1e-4)


def refuses(rank: int, world: int) -> str:
    x, weight, targets = data()
    x, weight = mine(rank, world, (x, 1), (weight, 0))
    targets[0, 0] = V
    with pytest.raises(ValueError) as error:
        vocabulary_cross_entropy(x, weight, targets, dist.group.WORLD)
    return str(error.value)


def test_a_target_that_nobody_has_is_an_error() -> None:
    assert "a target is 40: neither a token (0..39)" in run_ranks(refuses, 2)[0]
