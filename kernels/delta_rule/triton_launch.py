"""Launch parameters of the delta rule's kernels: the fallback, and what a tuner may try.

The chunk length is one for all kernels of a call, because they share tiles and states.
"""

from __future__ import annotations

import torch
import triton

from kernels.architecture import architecture, dot_precision, vendor
from kernels.tuning import Use, parameters

# The fallback for devices without a table, and for the interpreter. Tables: kernels/tuning/<architecture>.json.
DEFAULTS: dict[str, dict[str, dict[str, int]]] = {
    "delta_rule_prepare": {"generic": {"BC": 32, "num_warps": 4, "num_stages": 1}},
    "delta_rule_scan_forward": {"generic": {"BV": 32, "num_warps": 8, "num_stages": 2}},
    "delta_rule_scan_backward": {"generic": {"BV": 32, "num_warps": 8, "num_stages": 2}},
    # Not a launch: when a sequence is cut in segments. CHUNKS fixes a segment's length; 0 derives it: where the scan has
    # fewer than 1 / IDLE programs per unit, there are segments for about FILL programs a unit, of LEAST chunks or more.
    "delta_rule_segments": {"generic": {"CHUNKS": 0, "IDLE": 3, "FILL": 1, "LEAST": 8}},
    "delta_rule_join": {"generic": {"BV": 16, "num_warps": 8, "num_stages": 2}},
    "delta_rule_squares": {"generic": {"BV": 32, "num_warps": 4, "num_stages": 2}},
    "delta_rule_gradients": {"generic": {"BV": 16, "BR": 16, "num_warps": 8, "num_stages": 2}},
    "delta_rule_channel_gate": {"generic": {"num_warps": 8, "num_stages": 1}},
    "delta_rule_channel_tiles": {"generic": {"BC": 32, "num_warps": 4, "num_stages": 1}},
    "delta_rule_channel_gradients": {"generic": {"BC": 16, "BV": 64, "num_warps": 8, "num_stages": 1}},
}


def _options(*rows: tuple[int, int, int], name: str = "BV", **fixed: int) -> list[dict[str, int]]:
    return [{name: tile, "num_warps": warps, "num_stages": stages, **fixed} for tile, warps, stages in rows]


# What `kernels.bench --tune` may try, without those that spill on every architecture.
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "delta_rule_prepare": _options((32, 4, 1), (64, 4, 1), (128, 4, 1), (32, 8, 1), name="BC"),
    "delta_rule_scan_forward": _options(
        (64, 4, 3),
        (64, 4, 2),
        (64, 4, 1),
        (128, 8, 3),
        (128, 8, 2),
        (32, 4, 3),
        (32, 4, 2),
        (32, 4, 1),
        (32, 8, 2),
        (16, 4, 2),
    ),
    "delta_rule_scan_backward": _options(
        (64, 4, 3), (64, 4, 2), (64, 4, 1), (128, 8, 2), (32, 4, 3), (32, 4, 2), (32, 4, 1), (32, 8, 2), (16, 4, 2)
    ),
    "delta_rule_segments": [
        {"IDLE": idle, "FILL": fill, "LEAST": 8} for idle in (1, 2, 3, 4, 1000) for fill in (1, 2, 4)
    ],
    "delta_rule_join": _options((16, 4, 1), (16, 8, 2), (32, 8, 2), (32, 4, 1)),
    "delta_rule_gradients": [
        {**option, "BR": rows}
        for option in _options((64, 8, 1), (32, 8, 3), (32, 8, 2), (32, 8, 1), (16, 8, 2))
        for rows in (16, 32, 64)
    ],
    "delta_rule_channel_gate": [{"num_warps": warps, "num_stages": 1} for warps in (4, 8)],
    "delta_rule_channel_tiles": _options((64, 8, 1), (32, 8, 1), (32, 4, 1), name="BC"),
    "delta_rule_squares": _options((64, 4, 1), (64, 4, 2), (32, 4, 2), (64, 8, 1)),
    "delta_rule_channel_gradients": _options((32, 8, 1), (32, 4, 1), (64, 8, 1), name="BC", BV=64)
    + _options((32, 8, 1), (32, 4, 1), name="BC", BV=32),
}


def chunk_size(T: int, K: int, x: torch.Tensor, gate: int) -> int:
    """Tokens in a chunk. Wide keys, fp32 operands and gates of channels do not leave registers for 64 everywhere."""
    arch = architecture(x.device)
    largest = 64
    if K > 128 or x.dtype == torch.float32 or (gate == 2 and arch not in ("sm90", "sm100", "gfx942", "gfx950")):
        largest = 32
    if x.dtype == torch.float32 and vendor(arch) == "nvidia":
        largest = 16
    return max(16, min(largest, triton.next_power_of_2(T)))


def launch(kernel: str, x: torch.Tensor, **keys: int | str) -> Use:
    """Rows of the tables may ask about `keys` and about `bytes`, the size of an operand's element."""
    return parameters(kernel, architecture(x.device), defaults=DEFAULTS, bytes=x.element_size(), **keys)


def v_tile(kernel: str, x: torch.Tensor, *, V: int, descriptors: bool, **keys: int) -> tuple[Use, int, bool]:
    """(launch parameters, values a program holds at a time, whether it reads tiles through descriptors).

    Descriptors cannot mask a part of a head, so they serve only where V is a multiple of the tile; rows may ask about
    `pointers`, 1 where tiles are read without them.
    """
    use = launch(kernel, x, V=V, pointers=int(not descriptors), **keys)
    if descriptors and V % use["BV"]:
        use = launch(kernel, x, V=V, pointers=1, **keys)
    # At least two steps over V: of a single one the compiler makes straight code that holds everything at once.
    halve = kernel == "delta_rule_gradients" or V <= 32
    most = triton.next_power_of_2(max(V // 2 if halve else V, 16))
    block = min(use.pop("BV"), most)
    return use, block, descriptors and V % block == 0


def precision(x: torch.Tensor, purpose: str) -> str:
    return dot_precision(architecture(x.device), purpose)
