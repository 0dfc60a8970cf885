"""Launch parameters of the gated linear attention kernels: starting values per architecture, and what a tuner may try.

BK, BV: tile of the key and value dims (never wider than the head). SEGMENTS: parts into which the scan cuts a sequence,
0 to choose by the size of the device. Every entry compiles without a spill for its
architecture.
"""

from __future__ import annotations

_AMD = {"matrix_instr_nonkdim": 16, "num_stages": 1}
_GENERIC = {
    "gla_cumulative_gate": {"BS": 64, "num_warps": 4, "num_stages": 1},
    "gla_prepare": {"BK": 32, "num_warps": 8, "num_stages": 1},
    "gla_decay": {"BK": 32, "num_warps": 4, "num_stages": 1},
    "gla_scan": {"BK": 64, "BV": 64, "SEGMENTS": 0, "num_warps": 4, "num_stages": 2},
    "gla_fold": {"BLOCK": 512, "num_warps": 4, "num_stages": 1},
    "gla_output": {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 2},
    "gla_score_gradient": {"BV": 64, "num_warps": 4, "num_stages": 1},
    "gla_backward": {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 1},
    "gla_channel_backward": {"BK": 32, "BV": 64, "num_warps": 8, "num_stages": 1},
}
_MATRIX = ("gla_prepare", "gla_scan", "gla_output", "gla_score_gradient", "gla_backward", "gla_channel_backward")

DEFAULTS: dict[str, dict[str, dict[str, int]]] = {
    name: {"generic": use, **({"gfx942": _AMD, "gfx950": _AMD} if name in _MATRIX else {})}
    for name, use in _GENERIC.items()
}
# Without wgmma both operands of a product pass through registers.
DEFAULTS["gla_output"]["sm80"] = {"num_warps": 8}
DEFAULTS["gla_backward"]["sm80"] = {"num_warps": 8}
DEFAULTS["gla_score_gradient"]["sm80"] = {"BV": 32, "num_warps": 8}
# Blackwell's compiler gives one of four warps of a wide scan too few registers.
DEFAULTS["gla_scan"]["sm100"] = {"num_warps": 8}
DEFAULTS["gla_backward"]["sm100"] = {"num_warps": 8}


def _grid(**choices: tuple[int, ...]) -> list[dict[str, int]]:
    rows: list[dict[str, int]] = [{}]
    for name, values in choices.items():
        rows = [{**row, name: value} for row in rows for value in values]
    return rows


CANDIDATES: dict[str, list[dict[str, int]]] = {
    "gla_cumulative_gate": _grid(BS=(16, 32, 64, 128), num_warps=(2, 4, 8)),
    "gla_prepare": [*_grid(BK=(32, 64), num_warps=(8,)), *_grid(BK=(32,), num_warps=(4,))],
    "gla_decay": _grid(BK=(32, 64, 128), num_warps=(4, 8)),
    "gla_scan": [
        row
        for row in _grid(BK=(32, 64, 128), BV=(32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3, 4))
        if 2048 <= row["BK"] * row["BV"] <= 8192
    ],
    "gla_fold": _grid(BLOCK=(256, 512, 1024), num_warps=(2, 4)),
    "gla_output": _grid(BK=(32, 64, 128), BV=(64, 128), num_warps=(4, 8), num_stages=(1, 2, 3)),
    "gla_score_gradient": _grid(BV=(32, 64, 128), num_warps=(4, 8), num_stages=(1, 2)),
    "gla_backward": [
        *_grid(BK=(32, 64), BV=(32, 64), num_warps=(4,), num_stages=(1, 2)),
        *_grid(BK=(64, 128), BV=(32, 64), num_warps=(8,), num_stages=(1, 2)),
    ],
    "gla_channel_backward": _grid(BK=(32,), BV=(32, 64, 128), num_warps=(8,), num_stages=(1, 2)),
}
