"""A model's and a layout's sizes against the published rules, each with its reason and the numbers at hand.

Sources: Anthony et al. 2025 (arXiv 2511.17127, sections II and III), Anthony et al. 2024 (The case for co-designing model
architectures with hardware, arXiv 2401.14489), and for tokens per expert both together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from launch.plan.chip import RAMP
from launch.plan.forecast import Forecast, Planner
from launch.plan.legal import Legality
from launch.plan.reasons import duration
from launch.plan.source import with_
from parallel.fabric.fit import readable
from parallel.fabric.topology import XgmiMesh, factor

PLATEAU = 0.9  # share of the best rate that counts as full
POWER = 128  # a power of two that sizes should be multiples of
MOST_MICRO_BATCH = 256


@dataclass(frozen=True)
class Advice:
    """keeps: whether the rule is kept; None where it has nothing to say here. fix: what would keep it, perhaps nothing."""

    rule: str
    keeps: bool | None
    numbers: str
    reason: str
    fix: str = ""


def advice(planner: Planner, legality: Legality, forecast: Forecast) -> list[Advice]:
    return [
        *_heads(planner, forecast),
        _powers(forecast),
        *_experts(planner, forecast),
        _vocabulary(forecast),
        _tensor(planner, forecast),
        *_partial_nodes(planner, forecast),
        _stages(planner, forecast),
        _micro_batch(planner, legality, forecast),
        *_bucket(planner, forecast),
    ]


def _heads(planner: Planner, forecast: Forecast) -> Iterator[Advice]:
    found: dict[int, list[str]] = {}
    for name, mixer in forecast.config.model.mixers.items():
        head = getattr(mixer, "head_dim", None)
        if head is None and getattr(mixer, "heads", None):
            head = forecast.config.model.width // mixer.heads  # type: ignore[attr-defined]
        if head is not None:
            found.setdefault(head, []).append(name)
    for head, names in found.items():
        yield Advice(
            "head dim: a multiple of 64, normally 128",
            head % 64 == 0,
            f"{', '.join(names)}: {head}",
            "matrix units work on tiles of 64 and more; a smaller head leaves a part of each tile empty",
            "" if head % 64 == 0 else "change heads so that heads x head_dim stays and head_dim is 64 or 128",
        )


def _powers(forecast: Forecast) -> Advice:
    model, grid = forecast.config.model, forecast.grid
    sizes = {"width": model.width, "tokens of a micro-batch": forecast.costs.tokens}
    for name, ffn in model.ffns.items():
        hidden = getattr(ffn, "hidden", None)
        if hidden:
            cut = grid.tp if grid.expert_tensor or not hasattr(ffn, "experts") else 1
            sizes[f"{name}.hidden" + (f" / tp={cut}" if cut > 1 else "")] = hidden // cut
    for name, mixer in model.mixers.items():
        if getattr(mixer, "heads", None):
            head = getattr(mixer, "head_dim", None) or model.width // mixer.heads  # type: ignore[attr-defined]
            inner = mixer.heads * head // grid.tp  # type: ignore[attr-defined]
            sizes[f"{name}: heads x head_dim" + (f" / tp={grid.tp}" if grid.tp > 1 else "")] = inner
    wrong = {name: number for name, number in sizes.items() if number % POWER}
    shown = wrong or sizes
    return Advice(
        f"sizes of matrix products: multiples of large powers of two ({POWER} and more)",
        not wrong,
        ", ".join(f"{name} {number} = {_factored(number)}" for name, number in shown.items()),
        "products are computed in tiles of that size; what is left over costs a whole tile",
        "" if not wrong else "; ".join(f"{name}: {_near(number)}" for name, number in wrong.items()),
    )


def _factored(number: int) -> str:
    power = (number & -number).bit_length() - 1 if number else 0
    return f"2^{power} x {number >> power}" if number else "0"


def _near(number: int) -> str:
    below = number // POWER * POWER
    return " or ".join(str(n) for n in (below, below + POWER) if n)


def _experts(planner: Planner, forecast: Forecast) -> Iterator[Advice]:
    """Work of one expert's first product against the work at which a product reaches its plateau."""
    config, grid, chip = forecast.config, forecast.grid, forecast.chip
    plateau, source = RAMP * chip.ceiling * PLATEAU / (1 - PLATEAU), "200 GFLOP at 668 TFLOP/s, in proportion"
    measured = None if chip.measured is None else chip.measured.plateau_gflop.get(chip.precision)
    if measured is not None:
        plateau, source = 1e9 * measured, "measured"
    elif "MI300X" in chip.name:
        plateau, source = 200e9, "published for MI300X"
    for name, ffn in config.model.ffns.items():
        experts, hidden = getattr(ffn, "experts", None), getattr(ffn, "hidden", None)
        if not experts or not hidden:
            continue
        cut = grid.tp if grid.expert_tensor else 1
        own = forecast.costs.tokens / grid.tp * cut  # that a rank has for its experts, before they travel
        tokens = own * grid.ep * getattr(ffn, "top_k", 1) / experts
        work = 2.0 * config.model.width * 2 * hidden / cut  # FLOPs a token, gate and up together
        needed = plateau / work
        times = needed / tokens if tokens else float("inf")
        sequences = config.train.micro_batch * times
        yield Advice(
            f"tokens per expert: enough for {plateau / 1e9:.3g} GFLOP a product ({source})",
            tokens >= needed,
            f"{name}: {tokens:,.0f} tokens an expert, {tokens * work / 1e9:.3g} GFLOP; {needed:,.0f} would be enough",
            "below, a product ends before the device is full; experts' products are the smallest of the model",
            ""
            if tokens >= needed
            else f"{times:.3g} times as many: micro-batches of {sequences:.0f} sequences, more ep (the tokens of several ranks "
            "meet), or fewer and wider experts",
        )


def _vocabulary(forecast: Forecast) -> Advice:
    vocabulary, tp = forecast.config.model.vocabulary or 0, forecast.grid.tp
    unit = 64 * tp
    up = -(-vocabulary // unit) * unit
    return Advice(
        "vocabulary: a multiple of 64 x tp",
        vocabulary % unit == 0,
        f"{vocabulary} = {vocabulary / unit:.6g} x 64 x {tp}",
        "the head's product is the widest of the model, and each tensor-parallel rank has its share of the rows",
        "" if vocabulary % unit == 0 else f"model.vocabulary={up}: {up - vocabulary} rows that no token uses",
    )


def _tensor(planner: Planner, forecast: Forecast) -> Advice:
    node, tp = planner.question.fabric.node, forecast.grid.tp
    rule = "tensor parallelism: over the whole node or not at all"
    if not isinstance(node, XgmiMesh):
        return Advice(
            "tensor parallelism: inside a node",
            tp <= node.gpus,
            f"tp = {tp}, {node.gpus} GPUs a node",
            "its messages wait in every layer; between nodes they are many times slower",
            "" if tp <= node.gpus else f"mesh.tp={node.gpus} or less, and mesh.pp or mesh.cp for the rest",
        )
    used = f"{(min(tp, node.gpus) - 1) * node.link_gbs:g} of {(node.gpus - 1) * node.link_gbs:g} GB/s a GPU"
    return Advice(
        rule,
        tp in (1, node.gpus),
        f"tp = {tp}" + (f": {used}" if tp > 1 else " on nodes of " + str(node.gpus)),
        "on a mesh of links a group of n uses n - 1 of a GPU's links, and the others lie idle",
        "" if tp in (1, node.gpus) else f"mesh.tp=1, or mesh.tp={node.gpus} where the model's heads allow it",
    )


def _partial_nodes(planner: Planner, forecast: Forecast) -> Iterator[Advice]:
    """The same rule for other groups that lie inside a node."""
    node, grid = planner.question.fabric.node, forecast.grid
    if not isinstance(node, XgmiMesh):
        return
    for axis in ("cp", "ep"):
        ranks, stride = grid.extent(axis)
        inside = min(ranks, max(1, node.gpus // stride))
        if 1 < inside < node.gpus and ranks == inside:
            used, full = (inside - 1) * node.link_gbs, (node.gpus - 1) * node.link_gbs
            yield Advice(
                f"{axis}: its messages use as many links as its group has partners in the node",
                False,
                f"{axis} = {ranks}: {used:g} of {full:g} GB/s a GPU",
                "a degree of parallelism inside a node should be the whole node, or 1",
                f"mesh.{axis}={node.gpus} or mesh.{axis}=1",
            )


def _stages(planner: Planner, forecast: Forecast) -> Advice:
    layers, mesh, pp = len(planner.question.model.layers), forecast.config.mesh, forecast.grid.pp
    stages = pp * (mesh.pp_virtual or (1 if mesh.pp_schedule == "1f1b" else 2)) if pp > 1 else 1
    busiest = max(stage.flops for stage in forecast.costs.stages)
    mean = sum(stage.flops for stage in forecast.costs.stages) / len(forecast.costs.stages)
    numbers = f"{layers} layers, {stages} stage(s)"
    if pp > 1:
        numbers += f"; the busiest rank has {busiest / mean - 1:.1%} more FLOPs than the mean"
    fit = [str(n) for n in range(1, layers + 1) if layers % n == 0 and n <= 4 * stages]
    return Advice(
        "layers: divisible by the pipeline's stages",
        layers % stages == 0 if pp > 1 else None,
        numbers,
        "the dearest stage sets the pace of all; the head counts as layers, too",
        ""
        if layers % stages == 0
        else f"stages: {', '.join(fit[-4:])}; or mesh.pp_layers to even it out with the head",
    )


def _micro_batch(planner: Planner, legality: Legality, forecast: Forecast) -> Advice:
    """Doubles the micro-batch while it is legal and fits, for this very layout."""
    best = largest = forecast
    config, own = forecast.config, forecast.config.train.micro_batch
    trial = own * 2
    limited = "a larger one does not divide the batch"
    while trial <= MOST_MICRO_BATCH:
        one = with_(config, train={"micro_batch": trial})
        if legality.refusal(one, forecast.grid) is not None:
            break
        each = planner.forecast(one, forecast.grid)
        if not each.fits:
            limited = f"{trial} would lack {each.excess / 2**30:.4g} GiB"
            break
        largest = each
        if each.time.seconds < best.time.seconds:
            best = each
        trial *= 2
    most = largest.config.train.micro_batch
    gain = forecast.time.seconds - best.time.seconds
    worth = gain > 0.005 * forecast.time.seconds
    chosen = best.config.train.micro_batch
    return Advice(
        "micro-batch: as large as memory allows",
        not worth if forecast.fits else None,
        f"{own} sequence(s); at most {most} fit ({limited})",
        "larger products fill the device, and parameters are gathered less often; in a pipeline the bubble grows",
        f"train.micro_batch={chosen}: {duration(gain)} a step less ({gain / forecast.time.seconds:.1%})"
        if worth
        else "",
    )


def _bucket(planner: Planner, forecast: Forecast) -> Iterator[Advice]:
    """The smallest gradient message at saturated bandwidth (fusion buffer rule), against the messages of this layout."""
    fabric = planner.question.fabric
    summed = [
        message.collective
        for message in forecast.time.messages
        if message.collective.op in ("reduce_scatter", "all_reduce") and message.collective.hidden
    ]
    if not summed:
        return
    each = max(summed, key=lambda collective: collective.total)
    alpha = fabric.seconds(each.op, 0.0, each.ranks, each.ranks_in_node)
    probe = 2.0**40
    slope = (fabric.seconds(each.op, probe, each.ranks, each.ranks_in_node) - alpha) / probe
    if slope <= 0.0 or factor(each.op, each.ranks) == 0.0:
        return
    knee = alpha / slope * PLATEAU / (1 - PLATEAU)
    bucket = 2.0 ** max(0, (int(knee) - 1).bit_length())
    reached = each.bytes / (each.bytes + alpha / slope)
    torch = forecast.config.engine.kind == "torch"
    joined = f"engine.bucket_bytes={bucket:.0f} joins blocks, for their memory; " if torch else ""
    yield Advice(
        "gradient messages: the smallest size at saturated bandwidth, and no larger",
        reached >= PLATEAU,
        f"{each.op} over {each.ranks} ranks ({each.what}): {readable(each.bytes)} a call, {reached:.0%} of the bandwidth; "
        f"the knee is at {readable(knee)}, a bucket of {readable(bucket)}",
        "smaller ones pay latency; larger ones gain nothing and begin later",
        "" if reached >= PLATEAU else f"{joined}a smaller group has a lower knee (mesh.replicate: shard inside a node)",
    )
