"""The loss curve of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from pretrain.train import metrics
from pretrain.train.callback import Callback, Run

FILE = "loss.png"


class LossCurve(Callback):
    def on_end(self, run: Run) -> None:
        if run.processes.first:
            draw(run.folder)


def draw(folder: Path) -> Path:
    """Draws training loss (thin: every step, thick: smoothed), validation loss and learning rate of a run folder to loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = metrics.read(folder / metrics.FILE)
    validation_file = folder / "validation.jsonl"
    validation = (
        [json.loads(line) for line in validation_file.read_text().splitlines()] if validation_file.exists() else []
    )
    tokens = [record["tokens"] for record in records]
    loss = [float("nan") if record["loss"] is None else record["loss"] for record in records]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(tokens, loss, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(tokens, smoothed(loss), color="tab:blue", linewidth=1.8, label="training loss (smoothed)")
    if validation:
        label = "validation loss"
        bits = validation[-1].get("bits_per_byte")
        if bits is not None and bits == bits:
            label += f" (last: {bits:.3f} bits per byte)"
        points = [(record["tokens"], record["validation_loss"]) for record in validation]
        axes.plot(*zip(*points), color="tab:red", marker="o", markersize=4, linewidth=1.2, label=label)
    axes.set_xlabel("tokens")
    axes.set_ylabel("nats per token")
    axes.set_title(folder.name)
    axes.grid(alpha=0.25)
    rate = axes.twinx()
    rate.plot(tokens, [record["lr"] for record in records], color="tab:gray", linestyle=":", linewidth=1)
    rate.set_ylabel("learning rate (dotted)", color="tab:gray")
    axes.legend(loc="upper right")
    path = folder / FILE
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def smoothed(values: list[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average with the start's bias removed; values that are not finite are passed over."""
    average, norm, result = 0.0, 0.0, []
    for value in values:
        if value - value == 0:  # finite
            average, norm = weight * average + (1 - weight) * value, weight * norm + (1 - weight)
        result.append(average / norm if norm else float("nan"))
    return result
