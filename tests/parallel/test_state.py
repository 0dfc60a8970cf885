"""A model and its optimizer as a flat dictionary: the same names and numbers however the model is wrapped or sharded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from parallel.state import (
    load_model_tensors,
    load_optimizer_tensors,
    make_zero_state,
    model_tensors,
    named_parameters,
    optimizer_tensors,
)
from tests.ranks import run_ranks


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(x)))


MODEL_NAMES = [
    "model/embedding.weight",
    "model/block.0.weight",
    "model/block.0.bias",
    "model/block.1.weight",
    "model/block.1.bias",
    "model/block.1.running_mean",
    "model/block.1.running_var",
    "model/block.1.num_batches_tracked",
]
ADAM = ("step", "exp_avg", "exp_avg_sq")


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    x = torch.randint(6, (5,), generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def build(seed: int = 0) -> Tied:
    torch.manual_seed(seed)
    return Tied()


def test_names_tied_weights_and_buffers() -> None:
    model = build()
    tensors = model_tensors(model)
    assert list(tensors) == MODEL_NAMES  # the tied head and the buffer that is not persistent are absent
    assert tensors["model/embedding.weight"].data_ptr() == model.head.weight.data_ptr()
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_wrappers_do_not_change_names() -> None:
    model = build()
    wrapped: Any = torch.compile(checkpoint_wrapper(model.block))  # compiled at the first call, which does not come
    model.block = wrapped
    assert "block._orig_mod._checkpoint_wrapped_module.0.weight" in dict(model.named_parameters())
    assert list(model_tensors(model)) == MODEL_NAMES
    compiled: Any = torch.compile(build())
    assert list(model_tensors(compiled)) == MODEL_NAMES


def in_ddp(rank: int, world: int) -> list[str]:
    model = nn.parallel.DistributedDataParallel(build())
    return [*model_tensors(model), *(name for name, _ in named_parameters(model))]


def test_ddp_does_not_change_names() -> None:
    assert run_ranks(in_ddp, 1)[0][: len(MODEL_NAMES)] == MODEL_NAMES


@pytest.mark.parametrize(
    "kind",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), capturable=False, foreach=False, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
        lambda p: torch.optim.Adafactor(p, lr=0.1),
    ],
    ids=["adamw", "amsgrad", "sgd", "adafactor"],
)
def test_zero_state_changes_nothing_and_training_from_it_is_training_from_scratch(kind: Any) -> None:
    model, plain = build(), build()
    optimizer, plain_optimizer = kind(model.parameters()), kind(plain.parameters())
    make_zero_state(optimizer)
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters()):
        assert torch.equal(a, b) and a.grad is None, name
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)
    assert optimizer.param_groups[0]["weight_decay"] == plain_optimizer.param_groups[0]["weight_decay"]
    for seed in range(3):
        step(model, optimizer, seed)
        step(plain, plain_optimizer, seed)
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters()):
        assert torch.equal(a, b), name


def test_zero_state_leaves_gradients_and_present_state_alone() -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    weight, bias = (dict(model.named_parameters())[f"block.0.{name}"] for name in ("weight", "bias"))
    step(model, optimizer)
    optimizer.state.pop(weight)
    bias.grad = torch.ones(4)
    before = copy.deepcopy(optimizer.state[bias])
    tensors = optimizer_tensors(model, optimizer)
    assert all(torch.equal(before[key], optimizer.state[bias][key]) for key in ADAM)
    assert bias.grad.tolist() == [1, 1, 1, 1] and weight.grad is None
    assert tensors["optimizer/block.0.weight/step"] == 0 and tensors["optimizer/block.0.bias/step"] == 1
    assert tensors["optimizer/block.0.weight/exp_avg"].count_nonzero() == 0


def test_state_moves_to_a_fresh_model_and_training_goes_on_as_if_nothing_had_happened() -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for seed in range(3):
        step(model, optimizer, seed)
    saved = {k: v.clone() for k, v in {**model_tensors(model), **optimizer_tensors(model, optimizer)}.items()}
    assert {name.rsplit("/", 1)[1] for name in saved if name.startswith("optimizer/")} == set(ADAM)
    other = build(seed=9)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    load_model_tensors(other, saved)
    load_optimizer_tensors(other, other_optimizer, saved)
    step(model, optimizer, 5)
    step(other, other_optimizer, 5)
    for name, tensor in {**model_tensors(other), **optimizer_tensors(other, other_optimizer)}.items():
        expected = {**model_tensors(model), **optimizer_tensors(model, optimizer)}[name]
        assert torch.equal(tensor, expected), name


class Counting(torch.optim.Optimizer):
    """An optimizer whose state holds plain numbers."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["count"] = state.get("count", 0) + 1
                    state["scale"] = state.get("scale", 0.0) + float(parameter.grad.sum())
                    state["warm"] = True


def test_numbers_become_tensors_and_come_back_as_numbers() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = Counting(model.parameters())
    tensors = optimizer_tensors(model, optimizer)
    assert {name: (t.dtype, t.item()) for name, t in tensors.items()} == {
        "optimizer/weight/count": (torch.int64, 0),
        "optimizer/weight/scale": (torch.float64, 0.0),
        "optimizer/weight/warm": (torch.bool, False),
    }
    tensors["optimizer/weight/count"].fill_(2**40)
    tensors["optimizer/weight/scale"].fill_(0.1 + 0.2)
    tensors["optimizer/weight/warm"].fill_(True)
    load_optimizer_tensors(model, optimizer, tensors)
    assert optimizer.state[model.weight] == {"count": 2**40, "scale": 0.1 + 0.2, "warm": True}
    assert [type(v) for v in optimizer.state[model.weight].values()] == [int, float, bool]


def test_two_optimizers_share_out_one_model() -> None:
    model = nn.Linear(2, 2)
    optimizers = [torch.optim.SGD([model.weight], lr=0.1, momentum=0.9), torch.optim.AdamW([model.bias], lr=0.1)]
    assert set(optimizer_tensors(model, optimizers)) == {
        "optimizer/weight/momentum_buffer",
        *(f"optimizer/bias/{key}" for key in ADAM),
    }


def test_an_optimizer_that_does_not_begin_at_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"NAdam does not begin with zero state \(its mu_product"):
        make_zero_state(torch.optim.NAdam(nn.Linear(2, 2).parameters()))


def test_mistakes_are_named() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) that the model does not have"):
        optimizer_tensors(model, torch.optim.AdamW(nn.Linear(2, 2).parameters()))
    with pytest.raises(ValueError, match=r"1 tensors are missing: model/bias"):
        load_model_tensors(model, {"model/weight": torch.zeros(2, 2)})


def sharded(rank: int, world: int) -> dict[str, Tensor]:
    """FSDP2, one step, then an evaluation that leaves the root's parameters whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)), reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    make_zero_state(optimizer)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model(torch.ones(2, 3))
    tensors = {**model_tensors(model), **optimizer_tensors(model, optimizer)}
    assert all(isinstance(t, DTensor) for name, t in tensors.items() if not name.endswith("/step"))
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def test_sharded_state_has_the_names_and_numbers_of_one_rank() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    expected = {**model_tensors(model), **optimizer_tensors(model, optimizer)}
    for tensors in run_ranks(sharded, 2):
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
