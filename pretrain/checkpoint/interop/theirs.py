"""config.json of a Hugging Face folder, read so that nothing in it that matters goes unread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretrain.checkpoint.interop.plain import show

# What does not change which numbers a model computes, or does so for training only.
HARMLESS = {
    "_name_or_path", "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "attention_dropout", "initializer_range",
    "output_router_logits", "router_aux_loss_coef", "pretraining_tp", "attn_implementation", "_attn_implementation",
    "max_position_embeddings", "model_max_length", "use_sliding_window", "max_window_layers", "id2label", "label2id",
    "output_attentions", "output_hidden_states", "return_dict", "is_encoder_decoder", "auto_map",
}  # fmt: skip


class Theirs:
    """Keys are looked up by `get` and `only`; `unread` lists those that nobody asked for."""

    def __init__(self, values: dict[str, Any], where: str = "config.json"):
        self.values, self.where = values, where
        self._read: set[str] = set()

    @classmethod
    def of_folder(cls, folder: Path) -> Theirs:
        """Raises ValueError if there is no config.json, or no JSON object in it."""
        path = folder / "config.json"
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; give a Hugging Face model folder")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{folder} has no config.json; give a Hugging Face model folder") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected an object with keys, found {type(values).__name__}")
        return cls(values, str(path))

    def get(self, *keys: str, default: Any = None) -> Any:
        """The first of the keys (several names of one thing) that is there and not null."""
        self._read.update(keys)
        return next((self.values[key] for key in keys if self.values.get(key) is not None), default)

    def need(self, *keys: str) -> Any:
        """The same, for what a model cannot be without. Raises ValueError if it is missing."""
        found = self.get(*keys)
        if found is None:
            raise ValueError(f"{self.where}: {keys[0]} is missing")
        return found

    def only(self, key: str, allowed: Any, *, default: Any = None) -> None:
        """Raises ValueError unless the value (the default when absent) is the one that can be expressed here."""
        found = self.get(key, default=allowed if default is None else default)
        if found != allowed:
            raise ValueError(f"{self.where}: {key} = {show(found)}: only {show(allowed)} can be expressed here")

    def unread(self) -> list[str]:
        """Keys with a value that nobody asked for and that may matter."""
        return sorted(
            key for key, value in self.values.items() if key not in self._read | HARMLESS and value not in (None, False)
        )

    def rope(self, kind: str | None = None, fraction: float = 1.0, theta: float = 10_000.0) -> dict[str, Any]:
        """rope_theta and rope_fraction of an attention mixer. kind: of layers, where each has its own.

        Raises ValueError for positions that are scaled (llama3, yarn, ...).
        """
        found = self.get("rope_parameters", "rope_scaling", default={})
        found = found.get(kind, {}) if kind is not None else found
        scaling = found.get("rope_type") or found.get("type") or "default"
        if scaling != "default":
            raise ValueError(f"{self.where}: rope_parameters.rope_type = {scaling}: only default can be expressed here")
        if "rope_theta" in found and found["rope_theta"] is None:
            return {"rope_fraction": 0.0}
        share = found.get("partial_rotary_factor") or self.get("partial_rotary_factor", default=fraction)
        return {
            "rope_theta": float(found.get("rope_theta") or self.get("rope_theta", default=theta)),
            "rope_fraction": float(share),
        }


def rope_of(fraction: float, theta: float) -> dict[str, Any]:
    """rope_parameters of a config.json; without a base, for no positions."""
    if fraction == 0:
        return {"rope_type": "default", "rope_theta": None}
    share = {} if fraction == 1.0 else {"partial_rotary_factor": fraction}
    return {"rope_type": "default", "rope_theta": theta, **share}
