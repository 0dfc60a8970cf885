"""A forecast as plain numbers: what --json writes. Seconds, bytes, FLOPs, FLOP/s; shares between 0 and 1."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from launch.plan.failures import Failures
from launch.plan.forecast import Forecast
from launch.plan.ranking import Found
from launch.plan.reasons import limit, parts, settings, title, why
from launch.plan.room import Remedy
from launch.plan.sizing import Advice
from launch.plan.source import Question
from launch.plan.sweep import Curves, Point
from pretrain.config import RunConfig


def question(asked: Question) -> dict[str, Any]:
    return {
        "config": str(asked.path),
        "hardware": str(asked.hardware_path),
        "device": asked.hardware.name,
        "gpus": asked.gpus,
        "gpus_a_node": asked.node,
        "tokens": asked.tokens,
        "parameters": asked.model.parameters,
        "active_parameters": asked.model.active,
    }


def forecast(each: Forecast) -> dict[str, Any]:
    costs, time, grid = each.costs, each.time, each.grid
    names = ("weights", "gradients", "optimizer", "activations", "buffers", "peak")
    return {
        "layout": title(each),
        "grid": {
            "world": grid.world, "pp": grid.pp, "dp": grid.dp, "replicate": grid.replicate, "cp": grid.cp, "tp": grid.tp,
            "ep": grid.ep, "expert_tensor": grid.expert_tensor,
        },
        "engine": each.config.engine.model_dump(),
        "train": {
            "batch": each.config.train.batch, "micro_batch": each.config.train.micro_batch,
            "micro_batches": costs.micro_batches, "recompute": each.config.train.recompute,
            "precision": each.config.train.precision,
        },
        "memory": {name: getattr(costs, name) for name in names}
        | {"room": each.room, "excess": each.excess, "fits": each.fits},
        "flops": {
            "step": each.flops, "rank": costs.flops, "recomputed": costs.recomputed, "remade": costs.remade,
            "update": costs.update,
        },
        "collectives": [
            {
                **asdict(message.collective),
                "seconds": message.seconds,
                "exposed": message.exposed,
                "hidden_seconds": message.seconds - message.exposed,
            }
            for message in time.messages
        ],
        "products": [asdict(matmul) for matmul in costs.matmuls],
        "bubble": costs.bubble,
        "seconds": parts(each) | {"hidden": time.hidden, "step": time.seconds},
        "tokens_a_second": each.tokens_a_second,
        "tokens_a_second_a_gpu": each.tokens_a_second / grid.world,
        "mfu": each.mfu,
        "mfu_ceiling": each.mfu_ceiling,
        "days": each.days,
        "limit": limit(each),
    }  # fmt: skip


def memory(choices: dict[str, Forecast]) -> dict[str, Any]:
    return {
        name: {**forecast(each)["memory"], "step_seconds": each.time.seconds, "recomputed_flops": each.costs.recomputed}
        for name, each in choices.items()
    }


def failures(each: Failures) -> dict[str, Any]:
    return asdict(each)


def remedies(found: list[Remedy]) -> list[dict[str, Any]]:
    return [{"changes": each.changes, **forecast(each.forecast)} for each in found]


def advice(found: list[Advice]) -> list[dict[str, Any]]:
    return [asdict(each) for each in found]


def search(found: Found, base: RunConfig, most: int = 50) -> dict[str, Any]:
    return {
        "grids": found.grids,
        "tried": found.tried,
        "ranked": [
            {**forecast(each), "settings": settings(each.config, base), "why": why(each, found.ranked[0])}
            for each in found.ranked[:most]
        ],
        "refused": [asdict(each) for each in found.refused],
        "closest": None if found.closest is None else forecast(found.closest),
    }


def curves(found: Curves) -> dict[str, Any]:
    return {
        "complete": not found.interrupted,
        "strong": [_point(found, found.strong, each) for each in found.strong],
        "weak": [_point(found, found.weak, each) for each in found.weak],
    }


def _point(found: Curves, points: list[Point], point: Point) -> dict[str, Any]:
    return {
        "gpus": point.gpus,
        "refusal": point.refusal or None,
        "efficiency": found.efficiency(points, point),
        "forecast": None if point.forecast is None else forecast(point.forecast),
    }
