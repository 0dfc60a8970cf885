"""Launch parameters of the gated linear attention kernels: the fallback, and what a tuner may try.

BK, BV: tile of the key and value dims (never wider than the head). SEGMENTS: parts into which the scan cuts a sequence,
0 to choose by the size of the device.
"""

from __future__ import annotations

# The fallback for devices without a table, and for the interpreter. Tables: kernels/tuning/<architecture>.json.
DEFAULTS: dict[str, dict[str, dict[str, int]]] = {
    "gla_cumulative_gate": {"generic": {"BS": 64, "num_warps": 4, "num_stages": 1}},
    "gla_prepare": {"generic": {"BK": 32, "num_warps": 8, "num_stages": 1}},
    "gla_decay": {"generic": {"BK": 32, "num_warps": 4, "num_stages": 1}},
    "gla_scan": {"generic": {"BK": 64, "BV": 64, "SEGMENTS": 0, "num_warps": 4, "num_stages": 2}},
    "gla_fold": {"generic": {"BLOCK": 512, "num_warps": 4, "num_stages": 1}},
    "gla_output": {"generic": {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 2}},
    "gla_score_gradient": {"generic": {"BV": 64, "num_warps": 4, "num_stages": 1}},
    "gla_backward": {"generic": {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 1}},
    "gla_channel_backward": {"generic": {"BK": 32, "BV": 64, "num_warps": 8, "num_stages": 1}},
}


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
