"""Dense blocks cut into unions of experts, and put together again: single weights, and whole decoders by name.

Weights are only moved, never computed with: going there and back gives the same bits. The one exception is the output bias
b2 of a two-layer network, of which every expert gets b2 / n, since with all experts selected it is added n times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pretrain.model.decoder import DecoderConfig
from pretrain.model.ffns.union_of_experts import UnionOfExpertsConfig
from pretrain.model.mixers.selective_attention import SelectiveAttentionConfig
from pretrain.model.sublayer import require

State = dict[str, Tensor]
UnionConfig = UnionOfExpertsConfig | SelectiveAttentionConfig


def split_rows(weight: Tensor, experts: int) -> Tensor:
    """A layer that is cut by its outputs: weight [H, D] of a Linear -> [n, D, H / n]."""
    return weight.unflatten(0, (experts, -1)).transpose(1, 2).contiguous()


def join_rows(shards: Tensor) -> Tensor:
    """[n, D, F] -> [n * F, D]."""
    return shards.transpose(1, 2).flatten(0, 1).contiguous()


def split_columns(weight: Tensor, experts: int) -> Tensor:
    """A layer that is cut by its inputs: weight [D, H] of a Linear -> [n, H / n, D]."""
    return weight.T.unflatten(0, (experts, -1)).contiguous()


def join_columns(shards: Tensor) -> Tensor:
    """[n, F, D] -> [D, n * F]."""
    return shards.flatten(0, 1).T.contiguous()


def split_sections(weight: Tensor, sections: list[int], experts: int) -> Tensor:
    """Several layers in one weight [sum of sections, D], each cut by its outputs -> [n, D, sum of sections / n]."""
    return torch.cat([split_rows(part, experts) for part in weight.split(sections)], dim=-1)


def join_sections(shards: Tensor, sections: list[int]) -> Tensor:
    """The inverse of split_sections; sections as there, of the whole weight."""
    parts = shards.split([size // shards.shape[0] for size in sections], dim=-1)
    return torch.cat([join_rows(part) for part in parts])


def split_biases(b1: Tensor, b2: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Biases b1 [H] and b2 [D] of a two-layer network -> ([n, H / n], [n, D]), each expert with b2 / n."""
    return b1.unflatten(0, (experts, -1)).contiguous(), (b2 / experts).expand(experts, -1).contiguous()


def join_biases(b1: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of split_biases, to rounding; to the bit where n is a power of 2 and nothing was trained since."""
    return b1.flatten(), b2.sum(0)


def dense_config(config: DecoderConfig) -> DecoderConfig:
    """The config with the dense block in place of every union. Raises ValueError where the model has no such block."""

    def dense(part: object) -> object:
        return part.dense() if isinstance(part, UnionOfExpertsConfig | SelectiveAttentionConfig) else part

    mixers = {name: dense(part) for name, part in config.mixers.items()}
    ffns = {name: dense(part) for name, part in config.ffns.items()}
    return config.model_copy(update={"mixers": mixers, "ffns": ffns})


@torch.no_grad()
def convert_dense_to_union(state: Mapping[str, Tensor], config: DecoderConfig, seed: int = 0) -> State:
    """The state of a dense decoder (as state_dict gives it) -> that of the decoder with this config, which has unions.

    The dense decoder has dense_config(config). Routers are drawn with `seed`, as the decoder would draw them. Raises
    ValueError for weights that are missing, do not fit, or have no counterpart, naming them.
    """
    result = dict(state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for prefix, part in _unions(config):
            dense = _take(result, prefix, _shapes(part.dense(), config.width))
            up_name, down_name, up, down = _matrices(part)
            first = dense.pop(f"{up_name}.weight")
            last = dense.pop(f"{down_name}.weight")
            result[prefix + up] = split_sections(first, _sections(part, config.width), _experts(part))
            result[prefix + down] = split_columns(last, _experts(part))
            if f"{up_name}.bias" in dense:
                biases = split_biases(dense.pop(f"{up_name}.bias"), dense.pop(f"{down_name}.bias"), _experts(part))
                result[f"{prefix}{up}_bias"], result[f"{prefix}{down}_bias"] = biases
            result |= {prefix + name: tensor for name, tensor in dense.items()}  # norms that all heads share
            for name, tensor in _routers(part, config).items():
                result[f"{prefix}routing.{name}"] = tensor.to(first)
    return result


@torch.no_grad()
def convert_union_to_dense(state: Mapping[str, Tensor], config: DecoderConfig) -> State:
    """The state of a decoder with this config -> that of the decoder with dense_config(config). Routers are left out."""
    result = dict(state)
    for prefix, part in _unions(config):
        dense_shapes = _shapes(part.dense(), config.width)  # also refuses what has no dense block
        union = _take(result, prefix, _shapes(part, config.width))
        union = {name: tensor for name, tensor in union.items() if not name.startswith("routing.")}
        up_name, down_name, up, down = _matrices(part)
        result[f"{prefix}{up_name}.weight"] = join_sections(union.pop(up), _sections(part, config.width))
        result[f"{prefix}{down_name}.weight"] = join_columns(union.pop(down))
        if f"{up}_bias" in union:
            biases = join_biases(union.pop(f"{up}_bias"), union.pop(f"{down}_bias"))
            result[f"{prefix}{up_name}.bias"], result[f"{prefix}{down_name}.bias"] = biases
        result |= {prefix + name: tensor for name, tensor in union.items()}
        assert all(result[prefix + name].shape == shape for name, shape in dense_shapes.items())
    return result


def _unions(config: DecoderConfig) -> Iterator[tuple[str, UnionConfig]]:
    """(prefix of its names, config) of every union in the decoder."""
    layers = [(f"blocks.{index}.", layer) for index, layer in enumerate(config.pattern())]
    extra = config.extra_layer()
    layers += [("multi_token.block.", extra)] if extra else []
    for prefix, layer in layers:
        mixer = None if layer.mixer is None else config.mixers[layer.mixer]
        ffn = None if layer.ffn is None else config.ffns[layer.ffn]
        if isinstance(mixer, SelectiveAttentionConfig):
            yield f"{prefix}mixer.", mixer
        if isinstance(ffn, UnionOfExpertsConfig):
            yield f"{prefix}ffn.", ffn


def _matrices(part: UnionConfig) -> tuple[str, str, str, str]:
    """Names of the dense block's two layers and of the union's two stacks."""
    if isinstance(part, SelectiveAttentionConfig):
        return "qkv", "out", "qkv", "out"
    return "gate_up" if part.activation == "swiglu" else "up", "down", "up", "down"


def _experts(part: UnionConfig) -> int:
    return part.shards() if isinstance(part, SelectiveAttentionConfig) else part.experts


def _sections(part: UnionConfig, width: int) -> list[int]:
    """Sizes of the dense first layer's parts, each of which is cut by itself."""
    if not isinstance(part, SelectiveAttentionConfig):
        return [part.hidden, part.hidden] if part.activation == "swiglu" else [part.hidden]
    head_dim = part.head_dim or width // part.heads
    kv = (part.kv_heads or part.heads) * head_dim
    return [part.heads * head_dim, kv, kv]


def _shapes(part: object, width: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        module = part.build(width)  # type: ignore[attr-defined]
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _take(state: State, prefix: str, shapes: dict[str, torch.Size]) -> State:
    """Removes and returns everything below `prefix`, which must have these names and shapes."""
    found = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
    for name in shapes.keys() | found.keys():
        require(name in found, f"{prefix}{name} is missing from the state; give the whole state of the decoder")
        require(name in shapes, f"{prefix}{name} has no place in the config; remove it or change the config")
        require(
            found[name].shape == shapes[name],
            f"{prefix}{name} is {tuple(found[name].shape)}, but the config has {tuple(shapes[name])}; change the config",
        )
    return found


def _routers(part: UnionConfig, config: DecoderConfig) -> State:
    routing = part.routing(config.width, _experts(part))
    for module in routing.modules():
        init_weights = getattr(type(module), "init_weights", None)
        if init_weights is not None:
            init_weights(module, config.init_std)
    return dict(routing.state_dict())
