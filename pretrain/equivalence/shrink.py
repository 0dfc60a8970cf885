"""A small model of the same kinds as a large one: every sublayer and every option of it, with sizes for a laptop."""

from __future__ import annotations

from typing import Any

from pretrain.model.decoder import DecoderConfig

VOCABULARY, WIDTH = 256, 64
# Deeper weights than training starts with: every sublayer must show in the loss.
INIT_STD = 0.1
# Sizes that no rank shares out, and what they become at most.
SMALL = {
    "head_dim": 16, "value_dim": 16, "hidden": 64, "shared_hidden": 64, "kv_rank": 32, "query_rank": 32, "shared_dim": 8,
    "router_width": 16, "state_dim": 16, "rank": 8, "dt_rank": 8, "gate_rank": 8, "window": 12, "lift": 96, "depth": 2,
    "parts": 2, "top_k": 2, "kept": 4, "patch": 4, "expert_patch": 8, "groups": 2, "top_groups": 1,
}  # fmt: skip
# Counts that tensor and expert parallelism share out: as many as there are ranks, and at least these.
SHARED = {"heads": 4, "kv_heads": 4, "value_heads": 4, "experts": 8}


def shrink(config: DecoderConfig, ranks: int) -> tuple[DecoderConfig, list[str]]:
    """(the smaller model, what was changed, one line each).

    ranks: that the model is to be cut over; heads, experts and layers suffice for them where the large model's do. What is no
    size stays, and so do the relations between sizes that choose other code: fewer key heads than heads, more value heads.
    """
    said: list[str] = []
    whole = config.model_dump()
    made = dict(whole)
    for group in ("mixers", "ffns"):
        made[group] = {name: _smaller(section, ranks) for name, section in whole[group].items()}
        for name, section in made[group].items():
            said += [
                f"{group}.{name}.{key} {whole[group][name][key]} -> {value}"
                for key, value in section.items()
                if value != whole[group][name][key]
            ]
    made |= {"vocabulary": VOCABULARY, "width": WIDTH, "init_std": INIT_STD, "repeat": 1}
    said += [
        f"{key} {whole[key]} -> {made[key]}" for key in ("vocabulary", "width", "init_std") if whole[key] != made[key]
    ]
    every = config.pattern()
    kinds = list(dict.fromkeys(map(str, every)))
    wanted = max(3, ranks - 1)  # with the head, enough for a pipeline stage on every rank
    made["layers"] = kinds * -(-wanted // len(kinds))
    if made["layers"] != [str(layer) for layer in every]:
        said.append(f"{len(every)} layers -> {', '.join(made['layers'])}")
    return DecoderConfig.model_validate(made), said


def _smaller(section: dict[str, Any], ranks: int) -> dict[str, Any]:
    """A mixer's or an FFN's settings with smaller sizes."""
    made = dict(section)
    for key, value in section.items():
        if key in SHARED and isinstance(value, int):
            most = max(SHARED[key], ranks)
            made[key] = most if value > most else value
        elif key in SMALL and isinstance(value, int):
            made[key] = min(value, SMALL[key])
        elif key in SMALL and isinstance(value, list):
            made[key] = [min(width, SMALL[key]) for width in value]
    if section["kind"] == "mamba2":  # heads = expand * width / head_dim
        made["head_dim"] = min(made["head_dim"], int(section["expand"] * WIDTH) // max(8, ranks))
    heads = made.get("heads")
    if heads is None:
        return made
    if heads == 3 and section.get("head_dim") is None:
        made["heads"] = heads = 4  # heads share the width evenly
    if (section.get("kv_heads") or section["heads"]) < section["heads"]:
        made["kv_heads"] = min(made["kv_heads"], max(1, heads // 2))
    if (section.get("value_heads") or section["heads"]) > section["heads"]:
        made["value_heads"] = 2 * heads
    elif section.get("value_heads") is not None:
        made["value_heads"] = heads
    if (section.get("value_dim") or 0) > (section.get("head_dim") or section.get("value_dim") or 0):
        made["value_dim"] = 2 * SMALL["value_dim"]
    return made
