"""Launch parameters of the delta rule's kernels: starting values per architecture, and what a tuner may try.

The chunk length is one for all kernels of a call, because they share tiles and states.
"""

from __future__ import annotations

import torch
import triton

from kernels.architecture import architecture, dot_precision
from kernels.tuning import Use, parameters

_AMD = {"matrix_instr_nonkdim": 16, "num_stages": 1}

DEFAULTS: dict[str, dict[str, dict[str, int]]] = {
    "delta_rule_prepare": {
        "generic": {"num_warps": 4, "num_stages": 1},
        "gfx942": {**_AMD, "num_warps": 4},
        "gfx950": {**_AMD, "num_warps": 4},
    },
    "delta_rule_scan_forward": {
        "generic": {"BV": 64, "num_warps": 4, "num_stages": 2},
        "gfx942": {**_AMD, "BV": 32, "num_warps": 4},
        "gfx950": {**_AMD, "BV": 32, "num_warps": 4},
    },
    "delta_rule_scan_backward": {
        "generic": {"BV": 64, "num_warps": 4, "num_stages": 2},
        "gfx942": {**_AMD, "BV": 32, "num_warps": 4},
        "gfx950": {**_AMD, "BV": 32, "num_warps": 4},
    },
    # Not a launch: when a sequence is cut in segments. CHUNKS fixes a segment's length; 0 derives it: where the scan has
    # fewer than 1 / IDLE programs per unit, there are segments for about FILL programs a unit, of LEAST chunks or more.
    "delta_rule_segments": {
        "generic": {"CHUNKS": 0, "IDLE": 3, "FILL": 1, "LEAST": 8},
    },
    "delta_rule_join": {
        "generic": {"BV": 32, "num_warps": 4, "num_stages": 2},
        "gfx942": {**_AMD, "BV": 32},
        "gfx950": {**_AMD, "BV": 32},
    },
    "delta_rule_gradients": {
        "generic": {"BV": 64, "num_warps": 8, "num_stages": 1},
        "gfx942": {**_AMD, "BV": 32, "num_warps": 8},
        "gfx950": {**_AMD, "BV": 32, "num_warps": 8},
    },
    "delta_rule_channel_gate": {
        "generic": {"num_warps": 8, "num_stages": 1},
    },
    "delta_rule_channel_tiles": {
        "generic": {"BC": 64, "num_warps": 8, "num_stages": 1},
        "gfx942": {**_AMD, "BC": 32, "num_warps": 4},
        "gfx950": {**_AMD, "BC": 32, "num_warps": 4},
    },
    "delta_rule_channel_squares": {
        "generic": {"BV": 64, "num_warps": 4, "num_stages": 1},
        "gfx942": _AMD,
        "gfx950": _AMD,
    },
    "delta_rule_channel_gradients": {
        "generic": {"BC": 32, "BV": 64, "num_warps": 8, "num_stages": 1},
        "gfx942": {**_AMD, "BC": 32, "num_warps": 4},
        "gfx950": {**_AMD, "BC": 32, "num_warps": 4},
    },
}


def chunk_size(T: int, K: int, dtype: torch.dtype) -> int:
    """Tokens in a chunk. Wide keys and fp32 operands would not leave registers for 64."""
    largest = 64 if K <= 128 and dtype != torch.float32 else 32
    return max(16, min(largest, triton.next_power_of_2(T)))


def launch(kernel: str, x: torch.Tensor, **keys: int | str) -> Use:
    return dict(parameters(kernel, architecture(x.device), defaults=DEFAULTS, **keys))


def precision(x: torch.Tensor, purpose: str) -> str:
    return dot_precision(architecture(x.device), purpose)
