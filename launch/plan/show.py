"""A forecast as text."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from launch.plan.failures import Failures
from launch.plan.forecast import Forecast
from launch.plan.ranking import Found
from launch.plan.reasons import NAMES, duration, engine, layout, limit, parts, settings, title, why
from launch.plan.room import Remedy
from launch.plan.sizing import Advice
from launch.plan.source import Question
from launch.plan.sweep import Curves, Point
from parallel.fabric.fit import readable
from pretrain import figures
from pretrain.estimate.utilization import Ceiling, Impossible

if TYPE_CHECKING:
    from rich.table import Table

GIB = 2**30

human = partial(figures.human, digits=4)


def table(*heads: str, title: str | None = None, left: int = 1) -> Table:
    """Without lines; the first `left` columns flush left, and the last if its name begins with a blank."""
    from rich import box
    from rich.table import Table

    made = Table(
        box=box.SIMPLE_HEAD if any(heads) else None,
        title=title,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    for index, head in enumerate(heads):
        wide = head.startswith(" ")
        made.add_column(head.strip(), justify="left" if index < left or wide else "right", overflow="fold")
    return made


def heading(question: Question) -> str:
    chip, nodes = question.hardware.name, question.nodes
    where = f"{nodes} node{'s' if nodes > 1 else ''} of {question.node}" if question.gpus > 1 else "one of a node"
    return f"{question.path} on {question.gpus} x {chip} ({where})"


def model(question: Question, forecast: Forecast) -> Table:
    made = table("", "")
    made.columns[1].justify = "left"
    train = forecast.config.train
    a_token = forecast.flops / forecast.tokens_a_step
    rows = [
        ("layout", title(forecast)),
        ("parameters", f"{question.model.parameters:,} ({human(question.model.active)} active for a token)"),
        (
            "a step",
            f"{human(forecast.tokens_a_step)} tokens: {train.batch} sequences of {forecast.config.data.sequence_length}",
        ),
        (
            "FLOPs",
            f"{human(a_token)} a token, {human(forecast.flops)} a step, {human(forecast.flops / forecast.grid.world)} of that on "
            "each GPU",
        ),
    ]
    if forecast.grid.pp > 1:
        held = "; ".join(_layers(stage.layers) for stage in forecast.costs.stages[:8])
        more = "; ..." if len(forecast.costs.stages) > 8 else ""
        rows.append(("layers of stages", f"{held}{more}; bubble {forecast.costs.bubble:.1%}"))
    for row in rows:
        made.add_row(*row)
    return made


def _layers(numbers: tuple[int, ...]) -> str:
    if not numbers:
        return "none"
    runs: list[list[int]] = [[numbers[0], numbers[0]]]
    for number in numbers[1:]:
        if number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def memory(choices: dict[str, Forecast], chosen: str) -> Table:
    """The checkpointing choices side by side. Of the fullest rank, GiB."""
    heads = [f"{name} (chosen)" if name == chosen else name for name in choices]
    made = table("memory of the fullest rank, GiB", *heads)
    for name in ("weights", "gradients", "optimizer", "activations", "buffers", "peak"):
        made.add_row(name, *(f"{getattr(each.costs, name) / GIB:,.2f}" for each in choices.values()))
    any_one = next(iter(choices.values()))
    made.add_row(f"left of {any_one.room / GIB:.4g}", *(f"{-each.excess / GIB:,.2f}" for each in choices.values()))
    made.add_row("fits", *("yes" if each.fits else "NO" for each in choices.values()))
    made.add_row("step", *(duration(each.time.seconds) for each in choices.values()))
    return made


def messages(forecast: Forecast) -> Table | None:
    """Collectives of a step by axis, as the rank that sets the pace sees them."""
    shown = [message for message in forecast.time.messages if message.collective.ranks > 1 and message.collective.calls]
    if not shown:
        return None
    made = table(
        "axis",
        "op",
        "of",
        "ranks",
        "a call",
        "calls",
        "a step",
        "seconds",
        "exposed",
        title="messages of a step",
        left=3,
    )
    for message in sorted(shown, key=lambda message: -message.seconds):
        each = message.collective
        nodes = -(-each.ranks // each.ranks_in_node)
        made.add_row(
            each.axis,
            each.op,
            each.what,
            f"{each.ranks}" + (f" in {nodes} nodes" if nodes > 1 else ""),
            readable(each.bytes),
            f"{each.calls:,.5g}",
            readable(each.total),
            duration(message.seconds),
            duration(message.exposed),
        )
    return made


def step(forecast: Forecast) -> Table:
    seconds = forecast.time.seconds
    made = table("where a step's time goes", "", "")
    for name, spent in sorted(parts(forecast).items(), key=lambda part: -part[1]):
        if spent > 0.0:
            made.add_row(NAMES.get(name, name), duration(spent), f"{spent / seconds:.1%}")
    if forecast.time.hidden > 0.0:
        made.add_row("(messages behind computation)", duration(forecast.time.hidden), "")
    made.add_row("step", duration(seconds), "100.0%", style="bold")
    return made


def speed(forecast: Forecast) -> list[str]:
    rate = forecast.tokens_a_second
    useful = forecast.flops / forecast.time.seconds / forecast.grid.world
    return [
        f"{human(rate)} tokens/s, {human(rate / forecast.grid.world)} a GPU; {useful / 1e12:.4g} TFLOP/s a GPU: MFU "
        f"{percent(forecast.mfu)} of the nominal rate, {percent(forecast.mfu_ceiling)} of what products reach",
        f"{human(forecast.tokens)} tokens take {forecast.days:.3g} days without failures"
        if forecast.days >= 0.1
        else f"{human(forecast.tokens)} tokens take {duration(86400 * forecast.days)} without failures",
        limit(forecast),
    ]


def percent(share: float | None) -> str:
    return "no number" if share is None else f"{share:.1%}"


def impossible(forecast: Forecast) -> str | None:
    """Why the figures cannot be right, and what to do."""
    name, chip = forecast.chip.name, forecast.chip
    fix = "give another --hardware, or an --efficiency"
    for share, ceiling in (
        (forecast.mfu, Ceiling("MFU", chip.nominal, f"that the datasheet of {name} says it can do", fix)),
        (forecast.mfu_ceiling, Ceiling("MFU", chip.ceiling, f"that products reach on {name}", fix)),
    ):
        if share is None:
            return Impossible(ceiling, forecast.work, forecast.time.seconds).text
    return None


def reliability(failures: Failures, forecast: Forecast) -> list[str]:
    total = forecast.days / failures.efficiency if failures.efficiency > 1e-3 else None
    step = forecast.time.seconds
    lines = [
        f"{failures.per_day:.3g} failures a day: one in {duration(failures.mtbf)}, with {failures.nodes} node(s) that fail every "
        f"{duration(failures.mtbf * failures.nodes)} each",
        f"save every {failures.steps:,} steps ({duration(failures.interval)}; Daly 2006. Young 1974 says "
        f"{duration(failures.young)}): a save stops training for {duration(failures.save)} and is on disk "
        f"{duration(failures.writing)} later",
    ]
    if total is None:
        return [*lines, "failures come faster than saves and restarts: hardly any step would count"]
    lost = f"then {failures.efficiency:.1%} of the time counts"
    if failures.configured_steps != failures.steps:
        lost += f" (with checkpoint.every={failures.configured_steps}, {duration(failures.configured_steps * step)}: "
        lost += f"{failures.configured:.1%})"
    return [*lines, f"{lost}, and the run takes {total:.3g} days"]


def shortage(forecast: Forecast, found: list[Remedy]) -> list[str]:
    """For a model that does not fit."""
    lines = [
        f"DOES NOT FIT: {forecast.costs.peak / GIB:,.4g} GiB are needed and {forecast.room / GIB:.4g} GiB are there: "
        f"{forecast.excess / GIB:,.4g} GiB too much. The times below are those of a device that had them."
    ]
    if not found:
        return [*lines, "No single change and no usual combination makes it fit (--search looks at all layouts)."]
    lines.append("What would make it fit:")
    for remedy in found:
        room, slower = -remedy.forecast.excess / GIB, remedy.forecast.time.seconds / forecast.time.seconds
        lines.append(
            f"  {remedy.text}: {room:,.4g} GiB stay free, step {duration(remedy.forecast.time.seconds)} (x {slower:.3g})"
        )
    return lines


def sizing(found: list[Advice]) -> Table:
    made = table("", "size", " here", " why, and what to do", title="sizes")
    made.columns[1].justify = "left"
    for each in found:
        mark = {True: "ok", False: "!!", None: "-"}[each.keeps]
        made.add_row(mark, each.rule, each.numbers, each.reason + (f". -> {each.fix}" if each.fix else ""))
    return made


def candidates(found: Found, most: int = 10) -> Table:
    """The ranking, each row with what it loses to the first."""
    made = table("", "layout", "micro x acc", "recompute", "engine", "step", "MFU", "GiB", " why it loses", left=5)
    best = found.ranked[0]
    for place, each in enumerate(found.ranked[:most], 1):
        slower = "" if place == 1 else f"+{each.time.seconds / best.time.seconds - 1:.1%}"
        schedule = f" {each.config.mesh.pp_schedule}" if each.grid.pp > 1 else ""
        made.add_row(
            str(place),
            layout(each) + schedule,
            f"{each.config.train.micro_batch} x {each.costs.micro_batches}",
            each.config.train.recompute,
            engine(each.config),
            duration(each.time.seconds),
            percent(each.mfu),
            f"{each.costs.peak / GIB:.0f}",
            "the fastest" if place == 1 else f"{slower}: {why(each, best)}",
        )
    return made


def refused(found: Found, most: int = 12) -> Table | None:
    if not found.refused:
        return None
    made = table("refused", " reason", "grids")
    for each in found.refused[:most]:
        made.add_row(each.what, each.reason, str(each.count or ""))
    if len(found.refused) > most:
        made.add_row(
            "...", f"{len(found.refused) - most} more classes", str(sum(r.count for r in found.refused[most:]))
        )
    return made


def to_use(forecast: Forecast, base: Any) -> str:
    return "to use the first: " + (" ".join(settings(forecast.config, base)) or "the configuration has it already")


def scaling(curves: Curves) -> Table:
    made = table("GPUs", "strong", "tokens/s", "% a GPU", " layout", "weak", "tokens/s", "% a GPU", " layout", left=0)
    for strong, weak in zip(curves.strong, curves.weak):
        made.add_row(f"{strong.gpus:,}", *_point(curves, curves.strong, strong), *_point(curves, curves.weak, weak))
    return made


def _point(curves: Curves, points: list[Point], point: Point) -> tuple[str, str, str, str]:
    if point.forecast is None:
        return "-", "", "", point.refusal if len(point.refusal) < 90 else point.refusal[:87] + "..."
    share = curves.efficiency(points, point) or 0.0
    each = point.forecast
    mode = "" if each.config.train.recompute == "none" else f", {each.config.train.recompute}"
    return (
        duration(each.time.seconds),
        human(each.tokens_a_second),
        f"{100 * share:.1f}",
        f"{layout(each)}, {each.config.train.micro_batch} x {each.costs.micro_batches}{mode}",
    )
