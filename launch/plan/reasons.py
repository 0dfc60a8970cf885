"""In words: what limits a step, why one layout loses against another, and which settings make a layout."""

from __future__ import annotations

from collections import defaultdict

from launch.plan.forecast import Forecast
from launch.plan.step_time import Message
from parallel.drawing import line
from parallel.fabric.fit import readable
from pretrain.config import RunConfig

HINTS = {
    "products": "the chip computes at its best; more GPUs or fewer FLOPs are what makes it faster",
    "small": "larger micro-batches or wider layers would fill the device",
    "arithmetic": "faster attention and recurrence kernels, or shorter contexts, would help",
    "memory": "fused or compiled kernels (train.compile=true) would help",
    "recomputed": "memory is what is short: sharding more, or smaller micro-batches, may spare it",
    "optimizer": "sharding over more ranks, or more tokens a step, would make it matter less",
    "idle": "more micro-batches a step, or fewer or interleaved stages, would fill it",
}
NAMES = {
    "products": "matrix products at the ceiling",
    "small": "matrix products below the ceiling's rate",
    "arithmetic": "attention and recurrences",
    "memory": "element-wise work (memory bandwidth)",
    "recomputed": "activations computed again",
    "optimizer": "the optimizer's update",
    "idle": "waiting for other pipeline stages",
}


def parts(forecast: Forecast) -> dict[str, float]:
    """Seconds of a step by what takes them; messages that nothing hides by axis, as `messages over tp`."""
    time = forecast.time
    found = {
        "products": time.products - time.small,
        "small": time.small,
        "arithmetic": time.arithmetic,
        "memory": time.memory,
        "recomputed": time.recomputed,
        "optimizer": time.optimizer,
        "idle": time.idle,
    }
    exposed: defaultdict[str, float] = defaultdict(float)
    for message in time.messages:
        exposed[f"messages over {message.collective.axis}"] += message.exposed
    return found | exposed


def limit(forecast: Forecast) -> str:
    """One sentence: what takes most of a step, or that it does not fit."""
    if not forecast.fits:
        return f"Memory: the fullest rank lacks {forecast.excess / 2**30:.4g} GiB, so this job cannot run."
    shares = sorted(parts(forecast).items(), key=lambda part: -part[1])
    (first, most), *rest = shares
    seconds = forecast.time.seconds
    text = f"Most of the step is {name(first)} ({most / seconds:.0%})"
    if rest and rest[0][1] > 0.1 * seconds:
        text += f", then {name(rest[0][0])} ({rest[0][1] / seconds:.0%})"
    return f"{text}: {hint(first, forecast)}."


def name(part: str) -> str:
    return NAMES.get(part, part)


def hint(part: str, forecast: Forecast) -> str:
    if part in HINTS:
        return HINTS[part]
    axis = part.removeprefix("messages over ")
    worst = max((m for m in forecast.time.messages if m.collective.axis == axis), key=lambda m: m.exposed)
    return f"{_of(worst)} cost most of them"


def _of(message: Message) -> str:
    each = message.collective
    nodes = -(-each.ranks // each.ranks_in_node)
    where = "inside a node" if nodes == 1 else f"between {nodes} nodes"
    return f"{each.calls:.4g} x {each.op} of {readable(each.bytes)} ({each.what}) {where}"


def why(loser: Forecast, best: Forecast) -> str:
    """What a layout loses its time to, beside the best one."""
    ours, theirs = parts(loser), parts(best)
    behind = loser.time.seconds - best.time.seconds
    if behind <= 1e-9 * best.time.seconds:
        return "as fast, with more axes"
    gaps = sorted(((ours.get(k, 0.0) - theirs.get(k, 0.0), k) for k in {*ours, *theirs}), reverse=True)
    told = [f"{_more(gap, loser)} {name(k)}{_cause(k, loser, best)}" for gap, k in gaps[:2] if gap > 0.3 * behind]
    gained = [(gap, k) for gap, k in gaps if gap < -0.3 * behind]
    if gained:
        told.append(f"although {_more(-gained[-1][0], loser, 'less')} {name(gained[-1][1])}")
    return ", ".join(told) or "a little of everything"


def _more(gap: float, forecast: Forecast, word: str = "more") -> str:
    return f"{duration(gap)} {word}:" if word == "more" else f"{duration(gap)} {word}"


def _cause(part: str, loser: Forecast, best: Forecast) -> str:
    if part == "recomputed":
        return f" (recompute={loser.config.train.recompute}, to fit)"
    if part == "idle":
        return f" ({loser.costs.bubble:.0%} bubble: {loser.costs.micro_batches} micro-batches through {loser.grid.pp} stages)"
    if part == "small":
        return f" ({loser.config.train.micro_batch} sequence(s) a micro-batch, cut over tp={loser.grid.tp} cp={loser.grid.cp})"
    return f" ({hint(part, loser)})" if part.startswith("messages") and part in parts(loser) else ""


def settings(config: RunConfig, base: RunConfig) -> list[str]:
    """`key=value` for the command line, that turn `base` into the layout of `config`."""
    found = []
    if config.engine != base.engine:
        if config.engine.kind != base.engine.kind:
            found.append(f"engine.kind={config.engine.kind}")
        defaults = type(config.engine)()
        same = base.engine if config.engine.kind == base.engine.kind else defaults
        found += [
            f"engine.{key}={_text(value)}"
            for key, value in config.engine.model_dump().items()
            if key != "kind" and value != getattr(same, key)
        ]
    for section in ("mesh", "train"):
        ours, theirs = getattr(config, section).model_dump(), getattr(base, section).model_dump()
        found += [
            f"{section}.{key}={_text(value)}"
            for key, value in ours.items()
            if value != theirs[key] and (section == "mesh" or key in ("micro_batch", "recompute", "batch"))
        ]
    return found


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def title(forecast: Forecast) -> str:
    """A layout in one line."""
    config = forecast.config
    extras = [line(forecast.grid).replace(" rank(s)", " GPU" + ("s" if forecast.grid.world > 1 else ""))]
    if forecast.grid.pp > 1:
        virtual = f" x{config.mesh.pp_virtual}" if config.mesh.pp_virtual else ""
        extras.append(f"{config.mesh.pp_schedule}{virtual}")
    return "; ".join([*extras, engine(config), batch(forecast)])


def engine(config: RunConfig) -> str:
    if config.engine.kind == "deepspeed":
        offload = "" if config.engine.offload == "none" else f", {config.engine.offload} offloaded"
        return f"deepspeed ZeRO-{config.engine.stage}{offload}"
    words = ["" if config.engine.reshard_after_forward else "kept gathered"]
    words.append("reduced each micro-batch" if config.engine.reduce_each_micro_batch else "")
    return "torch" + "".join(f", {word}" for word in words if word)


def batch(forecast: Forecast) -> str:
    train = forecast.config.train
    text = f"micro-batch {train.micro_batch} x {forecast.costs.micro_batches}"
    return text if train.recompute == "none" else f"{text}, recompute {train.recompute}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds <= 0:
        return "0 s"
    for unit, scale in (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale * (2 if scale > 1 else 1):
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def layout(forecast: Forecast) -> str:
    """A layout, short: for tables and axes of pictures."""
    grid = forecast.grid
    sizes = [f"pp{grid.pp}" if grid.pp > 1 else "", f"dp{grid.dp}" if grid.replicate == 1 else ""]
    if grid.replicate > 1:
        sizes[1] = f"dp{grid.dp} ({grid.replicate} x {grid.shard})"
    sizes += [f"{axis}{grid.size(axis)}" for axis in ("cp", "tp", "ep") if grid.size(axis) > 1]
    return " ".join(size for size in sizes if size) + (" et" if grid.expert_tensor else "")
