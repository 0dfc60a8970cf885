"""The models of the bench, ours and theirs, and a training step of each."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = {"kind": "attention", "heads": 8, "kv_heads": 4, "head_dim": 64}
SWIGLU = {"kind": "swiglu", "hidden": 1408}
COMMON = {"vocabulary": 8192, "width": 512, "tie_embeddings": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {"mixers": {"a": {**ATTENTION, "qk_norm": False}}, "ffns": {"f": SWIGLU}, "layers": ["a + f x8"]},
    ),
    "gdn": (
        "qwen3_next",
        {
            "mixers": {
                "a": {**ATTENTION, "zero_centered_norm": True, "output_gate": True, "rope_fraction": 0.25},
                "g": {"kind": "gated_delta_net", "heads": 4, "value_heads": 8, "head_dim": 64, "value_dim": 64},
            },
            "ffns": {"f": SWIGLU},
            "layers": ["g + f x3", "a + f"],
            "repeat": 2,
            "block": {"zero_centered_norms": True},
        },
    ),
    "moe": (
        "qwen3_moe",
        {
            "mixers": {"a": ATTENTION},
            "ffns": {
                "m": {
                    "kind": "moe", "experts": 16, "top_k": 4, "hidden": 352, "gate": "softmax", "bias_rate": 0.0,
                }
            },
            "layers": ["a + m x8"],
        },
    ),
}  # fmt: skip
PEERS = {"llama": "Llama", "gdn": "Qwen3-Next", "moe": "Qwen3-MoE"}


@dataclass(frozen=True)
class Task:
    """What both are to do; travels to their processes.

    kind: transformers' name of the model; section: our model section. batch, length: sequences and tokens of each.
    folder: where their weights lie once they have been made.
    """

    kind: str
    section: dict[str, Any]
    precision: str
    batch: int
    length: int
    device: str
    folder: Path

    def tokens(self) -> Tensor:
        """int64 [batch, length + 1], the same in every process."""
        chance = torch.Generator().manual_seed(1)
        size = (self.batch, self.length + 1)
        return torch.randint(0, int(self.section["vocabulary"]), size, generator=chance).to(self.device)


@dataclass(frozen=True)
class Trained:
    """A model in training. loss: of the task's tokens, in nats a token. step: the same, with everything that makes a step."""

    model: nn.Module
    loss: Callable[[], Tensor]
    step: Callable[[], float]


def torch_forms(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """A modeling module's functions in whose place transformers calls GPU kernels of packages that happen to be installed, in
    their own torch code: by name, to be set instead on a CPU."""
    return {
        name: inspect.unwrap(value)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and hasattr(value, "__wrapped__") and value.__module__ == module.__name__
    }


def theirs(task: Task) -> Trained:
    """Makes the model, with random weights, and leaves them in the task's folder."""
    import transformers

    from pretrain.checkpoint.interop.form import find
    from pretrain.model.decoder import DecoderConfig

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if task.device == "cpu":
        modeling = importlib.import_module(f"transformers.models.{task.kind}.modeling_{task.kind}")
        for function, plain in torch_forms(modeling).items():
            setattr(modeling, function, plain)
    content = find(task.kind).write(DecoderConfig.model_validate(task.section))
    content |= {"max_position_embeddings": task.length, "use_cache": False}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(task.kind, **content)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(task.folder / "theirs")
    model = model.to(task.device).train()
    ids = task.tokens()
    shifted = ids[:, 1:].contiguous()

    def loss() -> Tensor:
        # The next token is the label: what their model shifts by itself is shifted here already.
        found: Tensor = model(input_ids=ids[:, :-1], shift_labels=shifted, labels=shifted).loss
        return found

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return _trained(task, model, loss, optimizer)


def ours(task: Task) -> Trained:
    """The model with the weights that `theirs` left."""
    from pretrain import placement
    from pretrain.checkpoint.interop.intake import intake
    from pretrain.model.decoder import DecoderConfig
    from pretrain.optim.adamw import AdamWConfig

    imported = intake(task.folder / "theirs", task.folder / "ours")
    model = placement.empty_decoder(DecoderConfig.model_validate(task.section))
    placement.fill(model, imported.checkpoint, torch.device("cpu"))
    model = model.to(task.device).train()
    ids = task.tokens()
    inputs, labels = ids[:, :-1].reshape(1, -1), ids[:, 1:].reshape(1, -1)
    borders = torch.arange(0, labels.numel() + 1, task.length, dtype=torch.int32, device=ids.device)

    def loss() -> Tensor:
        total: Tensor = model(inputs, targets=labels, cu_seqlens=borders)
        return total / labels.numel()

    return _trained(task, model, loss, AdamWConfig().build(model))


def _trained(task: Task, model: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Trained:
    from pretrain.train.step import autocast

    def step() -> float:
        with autocast(torch.device(task.device), task.precision):
            found = loss()
        found.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return found.item()  # waits for a GPU

    return Trained(model, loss, step)
