"""FLOPs of every mixer and FFN: what torch's counter sees of them, and the rest by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pretrain.estimate.layout import rank_costs
from pretrain.estimate.model import ModelCosts
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import Carry, ContextualFFN
from tests.pretrain.estimate.settings import config
from tests.pretrain.families import FFNS, MIXERS, build

T = 24
W = 32  # width of the families


def _sdpa(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """All T x T scores, masked or not."""
    return sdpa_flop_count(q, k, v)


COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa}


class Still(SequenceContext):
    """Recurrences and short convolutions without arithmetic: these are counted by hand."""

    def convolve(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x

    def recur(self, operator: Any, *inputs: Tensor | None, **kwargs: Any) -> Tensor:
        values = inputs[0] if operator.__name__ == "selective_scan" else inputs[2]
        assert values is not None
        return torch.zeros_like(values)


def counted(module: nn.Module) -> float:
    x = torch.randn(1, T, W)
    sequence = Still.of(torch.zeros(1, T, dtype=torch.int64), None)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter, torch.no_grad():
        if isinstance(module, ContextualFFN):
            module(x, sequence, None, Carry())
        elif getattr(module, "moves_along_sequence", False):
            module(x, sequence)
        else:
            module(x)
    return float(counter.get_total_flops()) / T


# What torch's counter cannot see, a token: taps of convolutions, and the recurrence as it is defined. By hand, from the sizes in
# tests/pretrain/families.py at width 32: (value heads, K, V) of the state, multiply-adds counted twice.
def state(heads: int, K: int, V: int, an_entry: float) -> float:
    return heads * K * V * an_entry


BY_HAND: dict[str, float] = {
    "conv_attention": 2 * 3 * 96,
    "cca": 2 * 2 * (4 + 2) * 8,  # depthwise: two taps on the channels of queries and keys
    "mla": -2 * 2 * 4 * T,  # values that a CPU's kernel fills up to the width of the keys
    "linear_attention": state(2, 16, 16, 4),
    "gla": state(2, 8, 16, 5),
    "hgrn2": state(2, 16, 16, 5),
    "retnet": state(2, 16, 32, 5),
    "delta_net": state(2, 16, 16, 6) + 2 * 4 * 96,
    "gated_delta_net": state(2, 16, 16, 7) + 2 * 4 * (16 + 16 + 32),
    "kda": state(2, 16, 16, 7) + 2 * 4 * 96,
    "kda_safe": state(2, 16, 16, 7) + 2 * 4 * 96,
    # Mamba: 64 channels of 8 states each: dt A, decay, write and read; per channel dt x, D x and the gate.
    "mamba": 64 * (8 * 6 + 4) + 2 * 4 * 64,
    # Mamba-2: 64 channels of 16 states each: decay, write and read; per channel dt x and D x.
    "mamba2": 64 * (16 * 5 + 3) + 2 * 4 * (64 + 2 * 2 * 16),
}


@pytest.mark.parametrize("name", [name for name in MIXERS if name not in ("wide_attention", "smha", "smha_threshold")])
def test_mixers(name: str) -> None:
    mixer, _ = _parts(name)
    assert mixer.flops_per_token(T) == counted(mixer) + BY_HAND.get(name, 0.0)


def _parts(name: str) -> tuple[Any, Any]:
    block: Any = build(f"mixer {name}").eval().blocks[0]
    return block.mixer, block.ffn


def test_a_window_is_as_many_keys_at_most() -> None:
    mixer, _ = _parts("wide_attention")
    assert mixer.window == 20
    assert mixer.flops_per_token(1000.0) == mixer.flops_per_token(20.0)
    mixer.window = None
    assert mixer.flops_per_token(T) == counted(mixer)


@pytest.mark.parametrize("name", ["smha", "smha_threshold"])
def test_selected_heads(name: str) -> None:
    """Half of the heads: their projections as torch counts them; of the scores a quarter."""
    mixer, _ = _parts(name)
    share, heads, head_dim = 0.5, mixer.qkv.shape[0] * mixer.heads, mixer.head_dim
    dense = 2.0 * share * (mixer.qkv.numel() + mixer.out.numel()) + mixer.routing.flops_per_token()
    assert mixer.flops_per_token(T) == dense + 4.0 * heads * head_dim * share**2 * T
    if name == "smha":
        scores = counted(mixer) - dense
        assert 0 < scores < 4.0 * heads * head_dim * T


@pytest.mark.parametrize("name", [name for name in FFNS if name not in ("union_threshold", "zaya_moe")])
def test_ffns(name: str) -> None:
    block: Any = build("mixer attention" if name == "swiglu" else f"ffn {name}").eval().blocks[0]
    assert block.ffn.flops_per_token(0.0) == counted(block.ffn)


def test_an_ffn_whose_tokens_may_skip_is_counted_as_if_none_did() -> None:
    block: Any = build("ffn zaya_moe").eval().blocks[0]
    assert block.ffn.skip == "zero"
    assert block.ffn.flops_per_token(0.0) == counted(block.ffn)  # at rest nobody skips


def test_a_union_by_thresholds_counts_the_share_it_aims_at() -> None:
    block: Any = build("ffn union_threshold").eval().blocks[0]
    ffn = block.ffn
    shards = 2.0 * (ffn.up.numel() + ffn.down.numel())
    assert ffn.flops_per_token(0.0) == 0.5 * shards + ffn.routing.flops_per_token()


def test_the_whole_model_and_a_rank_of_many() -> None:
    one = config("attention moe", train={"batch": 8, "micro_batch": 2})
    model = ModelCosts.of(one)
    per_token = 3 * model.flops_per_token((128 + 1) / 2)
    assert rank_costs(model, one, one.mesh.grid(1)).flops == per_token * 8 * 128
    for mesh in ({"dp": 4}, {"dp": 2, "tp": 2}, {"cp": 2, "tp": 2}, {"ep": 4}):
        many = config("attention moe", train={"batch": 8, "micro_batch": 2}, mesh=mesh)
        assert rank_costs(model, many, many.mesh.grid(4)).flops == per_token * 8 * 128 / 4
    piped = config("attention moe", train={"batch": 8, "micro_batch": 2}, mesh={"pp": 2})
    costs = rank_costs(model, piped, piped.mesh.grid(2))
    assert sum(stage.flops for stage in costs.stages) == pytest.approx(per_token * 8 * 128)
