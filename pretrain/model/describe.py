"""What a model consists of: layers, parameters, FLOPs and cache, as a table and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from pretrain.estimate.flops import keys, model_per_token, per_token
from pretrain.model.block import Block
from pretrain.model.decoder import Decoder
from pretrain.model.files import count, empty
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import Mixer, MixerConfig, Sublayer

if TYPE_CHECKING:
    from rich.table import Table

    from pretrain.model.decoder import DecoderConfig

SHORT, LONG = 24, 40  # tokens with which the caches are measured
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#ccb974", "#64b5cd")


@dataclass(frozen=True)
class CacheSize:
    """Bytes that one layer's mixer keeps while it generates in bf16: growing with every token, and whatever the length.

    window: tokens after which nothing grows any more, where there is such a limit.
    """

    per_token: float
    per_sequence: float
    window: int | None = None

    def at(self, tokens: int) -> float:
        return self.per_sequence + self.per_token * (tokens if self.window is None else min(tokens, self.window - 1))


@dataclass(frozen=True)
class Group:
    """Layers that are built alike. FLOPs: forward and backward for one token."""

    layers: list[int]
    name: str
    parameters: int
    active: int
    flops: float
    cache: CacheSize


@dataclass(frozen=True)
class Description:
    """context: mean number of keys that a token sees; the other numbers are for the whole model."""

    groups: list[Group]
    rest: list[tuple[str, int, float]]
    parameters: int
    active: int
    flops: float
    context: float


def describe(config: DecoderConfig, length: int) -> Description:
    """Counts on an empty model, FLOPs for documents of `length` tokens; one mixer of each definition is made for real, to measure
    its cache."""
    model = empty(config)
    caches = {name: cache_size(mixer, config.width) for name, mixer in config.mixers.items()}
    groups: dict[tuple[str, int], list[int]] = {}
    pattern = config.pattern()
    blocks = [cast(Block, block) for block in model.blocks]
    for index, (layer, block) in enumerate(zip(pattern, blocks)):
        groups.setdefault((str(layer), _size(block)), []).append(index)
    found = []
    for (name, size), layers in groups.items():
        block, mixer = blocks[layers[0]], pattern[layers[0]].mixer
        active = size + sum(part.active_parameters() - _size(part) for part in block.sublayers())
        flops = sum(per_token(part, length).training for part in block.sublayers())
        found.append(Group(layers, name, size, active, flops, caches[mixer] if mixer else CacheSize(0.0, 0.0)))
    total, active = count(model)
    rest = _rest(model, length)
    every = model_per_token(model, length).training
    return Description(found, rest, total, active, every, keys(length))


def _rest(model: Decoder, length: int) -> list[tuple[str, int, float]]:
    """(name, parameters, FLOPs) of what is outside the layers."""
    head = 6.0 * model.embedding.weight.numel()
    rows = [("embedding", model.embedding.weight.numel(), 0.0)]
    rows.append(("head", 0 if model.head is None else model.head.weight.numel(), head))
    if model.multi_token is not None:
        parts = sum(per_token(part, length).training for part in model.multi_token.block.sublayers())
        rows.append(
            (
                "multi-token layer",
                _size(model.multi_token),
                head + 6.0 * model.multi_token.join.weight.numel() + parts,
            )
        )
    accounted = sum(size for _, size, _ in rows) + sum(_size(block) for block in model.blocks)
    rows.append(("final norm, scales", count(model)[0] - accounted, 0.0))
    return rows


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.inference_mode()
def cache_size(config: MixerConfig, width: int) -> CacheSize:
    """Measured on the mixer itself, so that it is right for mixers that this file has never heard of."""
    mixer = config.build(width)
    assert isinstance(mixer, Mixer)
    short, long = (_held(mixer, width, tokens) for tokens in (SHORT, LONG))
    window = getattr(mixer, "window", None)
    if window is not None and window <= LONG:
        return CacheSize(long / (window - 1) if window > 1 else 0.0, 0.0, window)
    grown = (long - short) / (LONG - SHORT)
    return CacheSize(grown, short - SHORT * grown, window)


def _held(mixer: Mixer, width: int, tokens: int) -> int:
    cache: dict[str, object] = {}
    generator = torch.Generator().manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        row = torch.zeros(1, tokens, dtype=torch.int64)
        mixer(torch.randn(1, tokens, width, generator=generator), SequenceContext.of(row, None), cache)
    return sum(x.numel() * x.element_size() for x in cache.values() if isinstance(x, Tensor))


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"; evenly spaced ones, [3, 7, 11], -> "3, 7 .. 11"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(texts) if len(texts) <= 3 else f"{texts[0]}, {texts[1]} .. {texts[-1]}"


def table(description: Description, tokens: int) -> Table:
    """One row for each kind of layer, one for each other part, and the sum."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False)
    for heading in ("layers", "sublayers"):
        made.add_column(heading)
    for heading in ("parameters each", "in all", "active", "share", "GFLOP/token", "cache/token", "cache/sequence"):
        made.add_column(heading, justify="right")
    total = description.parameters
    for group in description.groups:
        number = len(group.layers)
        made.add_row(
            ranges(group.layers), group.name, f"{group.parameters:,}", f"{group.parameters * number:,}",
            f"{group.active * number:,}", f"{group.parameters * number / total:.1%}", f"{group.flops * number / 1e9:.4g}",
            size(group.cache.per_token * number), size(group.cache.per_sequence * number),
        )  # fmt: skip
    for name, parameters, flops in description.rest:
        made.add_row(
            "",
            name,
            "",
            f"{parameters:,}",
            f"{parameters:,}",
            f"{parameters / total:.1%}",
            f"{flops / 1e9:.4g}",
            "",
            "",
        )
    growing = sum(group.cache.per_token * len(group.layers) for group in description.groups)
    fixed = sum(group.cache.per_sequence * len(group.layers) for group in description.groups)
    made.add_section()
    made.add_row(
        "", "total", "", f"{total:,}", f"{description.active:,}", "100%", f"{description.flops / 1e9:.4g}",
        size(growing), size(fixed), style="bold",
    )  # fmt: skip
    whole = sum(group.cache.at(tokens) * len(group.layers) for group in description.groups)
    made.caption = (
        f"FLOPs: forward and backward for one token of a sequence of {tokens:,}. Cache in bf16; after {tokens:,} tokens "
        f"{size(whole)} a sequence."
    )
    made.caption_justify = "left"
    return made


def size(count: float) -> str:
    """1536.0 -> "1.5 KiB"."""
    if count == 0:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def draw(config: DecoderConfig, description: Description, path: Path) -> None:
    """The stack from the embedding (left) to the head (right): a column a layer, a bar a sublayer, its height its parameters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    model = empty(config)
    names = list(dict.fromkeys([*config.mixers, *config.ffns]))
    colour = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    figure, axes = pyplot.subplots(figsize=(max(6.0, 0.22 * len(model.blocks) + 3.0), 4.0), layout="constrained")
    for index, (layer, block) in enumerate(zip(config.pattern(), model.blocks)):
        bottom = 0.0
        for name, part in ((layer.mixer, cast(Block, block).mixer), (layer.ffn, cast(Block, block).ffn)):
            if name is None or part is None:
                continue
            all_of_it = _size(part) / 1e6
            active = cast(Sublayer, part).active_parameters() / 1e6
            axes.bar(index, all_of_it, 0.8, bottom, color=colour[name], alpha=0.35)
            axes.bar(index, active, 0.8, bottom, color=colour[name])
            bottom += all_of_it
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour[name]) for name in names]
    axes.legend(handles, names, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.set_xlabel("layer")
    axes.set_ylabel("million parameters (full colour: used by a token)")
    axes.set_title(f"{description.parameters / 1e9:.3f} B parameters, {description.active / 1e9:.3f} B active")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
