"""The models of the bench, ours and theirs, and a training step of each."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

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
KEEPS_APART = ("llama", "qwen3_moe")  # what a mask is enough for; a recurrence carries its state over a border
SPREAD = 1.0  # of the logarithm of a document's length: text from the web has a long tail


def document_lengths(tokens: int, mean: int, longest: int) -> tuple[int, ...]:
    """Lengths of documents, log-normal about the mean, none above `longest`, that make up `tokens`; always the same."""
    chance = torch.Generator().manual_seed(2)
    left, lengths = tokens, []
    while left:
        drawn = math.exp(math.log(mean) - SPREAD**2 / 2 + SPREAD * torch.randn((), generator=chance).item())
        lengths.append(min(max(1, round(drawn)), longest, left))
        left -= lengths[-1]
    return tuple(lengths)


@dataclass(frozen=True)
class Task:
    """What both are to do; travels to their processes.

    kind: transformers' name of the model; section: our model section. documents: tokens of each sequence; none sees another.
    folder: where their weights lie once they have been made.
    """

    kind: str
    section: dict[str, Any]
    precision: str
    documents: tuple[int, ...]
    device: str
    folder: Path

    def feeds(self) -> tuple[str, ...]:
        """How transformers can be given the documents: rows of a batch, padded where lengths differ, or one row with a mask."""
        masked = len(set(self.documents)) > 1 and self.kind in KEEPS_APART
        return ("padded", "masked") if masked else ("padded",)

    def tokens(self) -> list[Tensor]:
        """int64 [length + 1] of each document, the same in every process."""
        chance = torch.Generator().manual_seed(1)
        vocabulary = int(self.section["vocabulary"])
        return [torch.randint(0, vocabulary, (n + 1,), generator=chance).to(self.device) for n in self.documents]


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


def theirs(task: Task, feed: str = "padded") -> Trained:
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
    content |= {"max_position_embeddings": max(task.documents), "use_cache": False}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(task.kind, **content)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(task.folder / "theirs")
    model = model.to(task.device).train()
    batch = masked(task.tokens()) if feed == "masked" else padded(task.tokens())

    def loss() -> Tensor:
        # The next token is the label: what their model shifts by itself is shifted here already.
        found: Tensor = model(**batch, labels=batch["shift_labels"]).loss
        return found

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return _trained(task, model, loss, optimizer)


def padded(documents: list[Tensor]) -> dict[str, Tensor]:
    """A document a row. No mask is needed: a causal model's tokens see nothing of the padding after them."""
    rows = {"input_ids": [each[:-1] for each in documents], "shift_labels": [each[1:] for each in documents]}
    filling = {"input_ids": 0, "shift_labels": -100}
    return {name: pad_sequence(row, batch_first=True, padding_value=filling[name]) for name, row in rows.items()}


def masked(documents: list[Tensor]) -> dict[str, Tensor]:
    """One row. Positions that begin anew tell transformers where documents end: it makes a mask of them."""
    positions = [torch.arange(len(each) - 1, device=each.device) for each in documents]
    rows = {
        "input_ids": [each[:-1] for each in documents],
        "shift_labels": [each[1:] for each in documents],
        "position_ids": positions,
    }
    return {name: torch.cat(row)[None] for name, row in rows.items()}


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
    batch = masked(task.tokens())
    inputs, labels = batch["input_ids"], batch["shift_labels"]
    borders = torch.tensor([0, *accumulate(task.documents)], dtype=torch.int32, device=inputs.device)

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
