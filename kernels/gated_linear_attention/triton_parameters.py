"""Launch parameters of the gated linear attention kernels: starting values per architecture, and what a tuner may try."""

from __future__ import annotations

_AMD = {"matrix_instr_nonkdim": 16, "num_stages": 1}

DEFAULTS: dict[str, dict[str, dict[str, int]]] = {
    "gla_cumulative_gate": {"generic": {"BS": 64, "num_warps": 4, "num_stages": 1}},
    "gla_prepare": {"generic": {"BK": 64, "num_warps": 4, "num_stages": 1}, "gfx942": _AMD, "gfx950": _AMD},
    "gla_decay": {"generic": {"BK": 64, "num_warps": 4, "num_stages": 1}},
    "gla_scan": {"generic": {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 2}, "gfx942": _AMD, "gfx950": _AMD},
    "gla_output": {"generic": {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 2}, "gfx942": _AMD, "gfx950": _AMD},
    "gla_backward": {"generic": {"BK": 64, "BV": 64, "num_warps": 8, "num_stages": 1}, "gfx942": _AMD, "gfx950": _AMD},
    "gla_channel_backward": {
        "generic": {"BK": 64, "BV": 64, "num_warps": 8, "num_stages": 1},
        "gfx942": _AMD,
        "gfx950": _AMD,
    },
}
