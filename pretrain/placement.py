"""Where a model's weights are kept when one device cannot hold them: on GPUs, in CPU memory, on disk.

The unit is a layer. Embedding, final norm and head stay on the main device, because every token meets them twice and the
head may be the embedding. Layers are placed in order by accelerate's rule, which keeps room on the main device for the largest
layer that waits elsewhere; such a layer is copied to the main device for its own forward pass and leaves it afterwards.

accelerate's `dispatch_model` is not used, only its parts: it would move the embedding away from the head that shares its weight,
and its hooks do not know that a SequenceContext holds tensors.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import (
    OffloadedWeightsLoader,
    PrefixedDataset,
    get_max_memory,
    infer_auto_device_map,
    offload_weight,
    set_module_tensor_to_device,
)
from torch import Tensor, nn

from parallel.state import model_tensors
from pretrain.checkpoint.storage import contents, read
from pretrain.exit import USAGE, Exit
from pretrain.model.block import Block
from pretrain.model.decoder import Decoder, DecoderConfig
from pretrain.model.sequence import SequenceContext

DISK = "disk"
ONLY_TRAINED = ("multi_token.",)  # not used after training: such weights stay without memory in a placed model
PREFIX = "model/"


@dataclass(frozen=True)
class Placement:
    """main: the device of embedding, norm and head, where waiting layers compute. blocks: each layer's home, a GPU's number,
    "cpu" or "disk"."""

    main: torch.device
    blocks: list[int | str]

    def home(self, index: int) -> torch.device | None:
        """Where layer `index` computes without being moved; None for a layer that waits elsewhere."""
        where = self.blocks[index]
        if where == "cpu":
            return self.main if self.main.type == "cpu" else None
        return None if where == DISK else torch.device("cuda", int(where))

    def __str__(self) -> str:
        counts = {where: self.blocks.count(where) for where in dict.fromkeys(self.blocks)}
        names = {where: f"GPU {where}" if isinstance(where, int) else str(where) for where in counts}
        return ", ".join(f"{count} on {names[where]}" for where, count in counts.items())


def empty_decoder(config: DecoderConfig) -> Decoder:
    """A decoder whose parameters have shapes but no memory (the meta device). Buffers are small and real."""
    with init_empty_weights(include_buffers=False):
        return Decoder(config)


def place(model: Decoder, main: torch.device, limits: Mapping[int | str, int] | None) -> Placement:
    """Decides where the layers of an empty decoder go.

    limits: bytes for a GPU's number, "cpu", or "each" (every GPU, or the CPU when `main` is the CPU); devices not named hold
    what is free on them now, but GPUs only when no GPU is named. Raises Exit when not even one layer fits.
    """
    memory = _memory(main, dict(limits or {}))
    key: int | str = "cpu" if main.type == "cpu" else (main.index or 0)
    pinned = sum(_bytes(t) for name, t in model_tensors(model).items() if _unit(name) == "")
    layers = [sum(_bytes(t) for t in [*block.parameters(), *block.buffers()]) for block in model.blocks]
    needed = pinned + max(layers)
    if memory.get(key, 0) < needed:
        raise Exit(
            f"a limit of {readable(memory.get(key, 0))} on {main} is too small for this model: embedding, norm and head need "
            f"{readable(pinned)} and the largest layer {readable(max(layers))}; allow at least {readable(needed, up=True)}",
            USAGE,
        )
    memory[key] -= pinned
    found = infer_auto_device_map(model.blocks, memory, [Block.__name__], clean_result=False)
    return Placement(main, [found[str(index)] for index in range(len(layers))])


def _memory(main: torch.device, limits: dict[int | str, int]) -> dict[int | str, int]:
    if main.type == "cpu":
        if any(isinstance(name, int) for name in limits):
            raise Exit(
                "the memory limit names a GPU, but the model runs on the CPU; use --device cuda or cpu=SIZE", USAGE
            )
        if {"each", "cpu"} <= set(limits):
            raise Exit("on the CPU, SIZE and cpu=SIZE mean the same memory; give one of them", USAGE)
        given = limits.get("each", limits.get("cpu"))
        return {"cpu": get_max_memory()["cpu"] if given is None else given}
    free = get_max_memory()
    gpus = [name for name in free if isinstance(name, int)]
    unknown = [name for name in limits if isinstance(name, int) and name not in gpus]
    if unknown:
        raise Exit(f"the memory limit names GPU {unknown[0]}, but the GPUs here are {gpus}", USAGE)
    named = any(isinstance(name, int) for name in limits)
    memory: dict[int | str, int] = {}
    for name in gpus:
        given = limits.get(name, limits.get("each"))
        if given is not None or not named:
            memory[name] = free[name] if given is None else given
    return {**memory, "cpu": limits.get("cpu", free["cpu"])}


def fill(model: Decoder, checkpoint: Path, main: torch.device) -> Decoder:
    """Reads a whole checkpoint into an empty decoder and moves it to one device.

    Raises ValueError if the tensors do not fit, CheckpointError if they cannot be read.
    """
    values = _memory_for(model_tensors(model))
    read(checkpoint, values)
    _put(model, values, main)
    return cast(Decoder, model.to(main))


def fill_placed(model: Decoder, checkpoint: Path, placement: Placement, offload: str | Path | None) -> Decoder:
    """Reads a checkpoint into an empty decoder layer by layer, each straight to its home.

    offload: folder for the layers on disk, one raw file a tensor; they are removed when the model is. Never more than one layer
    is in memory besides those that live there. Errors as for `fill`.
    """
    names = model_tensors(model)
    surplus = [name for name in contents(checkpoint) if name.startswith(PREFIX) and name not in names]
    if surplus:
        raise ValueError(f"{checkpoint} does not fit this model: it also holds {', '.join(sorted(surplus)[:10])}")
    folder = _folder(model, placement, offload)
    rest = {name: t for name, t in names.items() if _unit(name) == ""}
    _put(model, _read_part(checkpoint, rest), placement.main)
    for buffers in [model._buffers, *(child._buffers for child in _outside(model))]:
        for name, buffer in buffers.items():
            buffers[name] = None if buffer is None else buffer.to(placement.main)
    for index, block in enumerate(model.blocks):
        prefix = f"blocks.{index}."
        values = _read_part(checkpoint, {n: t for n, t in names.items() if n.startswith(PREFIX + prefix)})
        home = placement.home(index)
        if home is not None:
            _put(model, values, home)
            block.to(home)
            add_hook_to_module(block, _LayerHook(execution_device=home))
            continue
        parameters = {n.removeprefix(PREFIX): values[n] for n in values if names[n].is_meta}
        waiting: Mapping[str, Tensor]
        if placement.blocks[index] == DISK:
            index_of: dict[str, Any] = {}
            for name, value in parameters.items():
                offload_weight(value, name, folder, index_of)
            waiting = PrefixedDataset(OffloadedWeightsLoader(save_folder=folder, index=index_of), prefix)
        else:
            waiting = PrefixedDataset(parameters, prefix)
        hook = _LayerHook(execution_device=placement.main, offload=True, weights_map=waiting, place_submodules=True)
        add_hook_to_module(block, hook)
    # The stream comes home from the last layer's device before the norm.
    add_hook_to_module(model.norm, AlignDevicesHook(execution_device=placement.main))
    return model


class _LayerHook(AlignDevicesHook):
    """Brings a layer's inputs (and, for a waiting layer, its weights) to where it computes."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device = torch.device(self.execution_device)
        moved = tuple(_sequence_on(arg, device) if isinstance(arg, SequenceContext) else arg for arg in args)
        return super().pre_forward(module, *moved, **kwargs)


def _sequence_on(sequence: SequenceContext, device: torch.device) -> SequenceContext:
    if sequence.positions.device == device:
        return sequence
    public = {f.name: getattr(sequence, f.name) for f in fields(sequence) if not f.name.startswith("_")}
    on_device = {name: value.to(device) for name, value in public.items() if isinstance(value, Tensor)}
    return replace(sequence, **on_device, _rotary={})


def _folder(model: Decoder, placement: Placement, offload: str | Path | None) -> str:
    """A fresh folder for the layers that go to disk; removed with the model, at the latest when the process ends."""
    on_disk = [b for b, where in zip(model.blocks, placement.blocks) if where == DISK]
    needed = sum(_bytes(p) for block in on_disk for p in block.parameters())
    if not on_disk:
        return ""
    if offload is None:
        raise Exit(
            f"{len(on_disk)} of {len(model.blocks)} layers ({readable(needed)}) fit neither on the devices nor in CPU memory; "
            "give --offload FOLDER (offload_folder=) on a disk with room for them, or a larger --memory-limit",
            USAGE,
        )
    Path(offload).mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(offload).free
    if free < needed:
        raise Exit(
            f"{offload}: {len(on_disk)} layers need {readable(needed)}, but {readable(free)} are free there", USAGE
        )
    folder = tempfile.mkdtemp(prefix="layers-", dir=offload)
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return folder


def _unit(name: str) -> str | None:
    """ "" for what stays on the main device, "blocks" for layers, None for what only training uses."""
    own = name.removeprefix(PREFIX)
    if own.startswith(ONLY_TRAINED):
        return None
    return "blocks" if own.startswith("blocks.") else ""


def _outside(model: Decoder) -> list[nn.Module]:
    """The modules that stay on the main device."""
    return [module for name, module in model.named_modules() if name and _unit(f"{name}.") == ""]


def _memory_for(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty_like(t, device="cpu") if t.is_meta else t for name, t in tensors.items()}


def _read_part(checkpoint: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    values = _memory_for(tensors)
    read(checkpoint, values, subset=True)
    return values


def _put(model: Decoder, values: Mapping[str, Tensor], device: torch.device) -> None:
    """Gives the empty parameters among `values` their memory."""
    empty = {name for name, p in model.named_parameters() if p.is_meta}
    for name, value in values.items():
        own = name.removeprefix(PREFIX)
        if own in empty:
            set_module_tensor_to_device(model, own, device, value=value, clear_cache=False)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def resident_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that are in memory at this moment, on whatever device."""
    return sum(_bytes(p) for p in model.parameters() if not p.is_meta)


def readable(count: int, up: bool = False) -> str:
    """1610612736 -> 1.5 GiB; `up` never rounds down, for advice that must suffice."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    digits = 0 if units[0] == "B" else 2
    if up:
        size += 0.005 if digits else 0
    return f"{size:.{digits}f} {units[0]}"
