"""A profile as a table, as numbers and as a picture."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pretrain.profiling.attribution import PASSES, PHASES, Spent

MODULES = 12  # shown; the json has all
OPERATIONS = 8


@dataclass(frozen=True)
class Profile:
    """start: the first profiled step. timeline: see record._timeline. device: seconds by kernel, empty without a GPU."""

    start: int
    spent: Spent
    timeline: list[tuple[float, int]]
    device: dict[str, float]

    @property
    def steps(self) -> int:
        return max(1, self.spent.steps)

    @property
    def peak(self) -> int:
        """Bytes."""
        return max((size for _, size in self.timeline), default=0)

    def modules(self) -> list[tuple[str, dict[str, float]]]:
        """Self time by module, blocks of one kind taken together (blocks.*.mixer), most first."""
        found: dict[str, dict[str, float]] = {}
        for name, ways in self.spent.modules.items():
            total = found.setdefault(alike(name), dict.fromkeys(PASSES, 0.0))
            for way, seconds in ways.items():
                total[way] += seconds
        return sorted(found.items(), key=lambda item: -sum(item[1].values()))

    def table(self) -> str:
        """Milliseconds a step."""
        scale, whole = 1e3 / self.steps, max(self.spent.seconds, 1e-12)
        end = f" to {self.start + self.steps - 1}" if self.steps > 1 else ""
        lines = [f"profile of step {self.start}{end}, ms a step: {scale * whole:.1f} in all", ""]
        lines.append(f"{'phase':44}{'ms':>10}{'share':>8}")
        for name in PHASES:
            seconds = self.spent.phases.get(name, 0.0)
            if seconds:
                lines.append(f"{name:44}{scale * seconds:10.2f}{seconds / whole:8.1%}")
        lines += ["", f"{'module (own time, without that of modules within)':44}" + "".join(f"{w:>12}" for w in PASSES)]
        rows = self.modules()
        for name, ways in rows[:MODULES]:
            lines.append(f"{name or '(outside of modules)':44}" + "".join(f"{scale * ways[w]:12.2f}" for w in PASSES))
        if len(rows) > MODULES:
            rest = {way: sum(ways[way] for _, ways in rows[MODULES:]) for way in PASSES}
            lines.append(f"{f'{len(rows) - MODULES} more':44}" + "".join(f"{scale * rest[w]:12.2f}" for w in PASSES))
        for title, times in (("operation (own time)", self.spent.operations), ("kernel on the device", self.device)):
            if times:
                lines += ["", f"{title:44}{'ms':>10}{'share':>8}"]
                most = sorted(times.items(), key=lambda item: -item[1])[:OPERATIONS]
                lines += [f"{name[:43]:44}{scale * s:10.2f}{s / whole:8.1%}" for name, s in most]
        if self.timeline:
            lines += [
                "",
                f"memory: {self.peak / 2**20:.1f} MiB more at its peak than when the first of these steps began",
            ]
        return "\n".join(lines)

    def content(self) -> dict[str, object]:
        return {
            "start": self.start,
            "steps": self.steps,
            "seconds": self.spent.seconds,
            "phases": dict(self.spent.phases),
            "modules": dict(self.spent.modules),
            "operations": dict(sorted(self.spent.operations.items(), key=lambda item: -item[1])),
            "device": self.device,
            "peak_bytes": self.peak,
        }


def alike(name: str) -> str:
    """blocks.3.mixer.qkv -> blocks.*.mixer.qkv"""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def write(profile: Profile, stem: Path) -> None:
    """STEM.txt, .json and .png."""
    Path(f"{stem}.txt").write_text(profile.table() + "\n")
    Path(f"{stem}.json").write_text(json.dumps(profile.content(), indent=1) + "\n")
    draw(profile, Path(f"{stem}.png"))


def draw(profile: Profile, path: Path) -> None:
    """Phases and modules as bars, and memory over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scale = 1e3 / profile.steps
    figure, (phases, modules, memory) = pyplot.subplots(
        3, 1, figsize=(9, 9), layout="constrained", height_ratios=(1.1, 4, 2.2)
    )
    left = 0.0
    colors = dict(zip(PHASES, pyplot.get_cmap("tab10").colors))  # type: ignore[attr-defined]
    for name in PHASES:
        width = scale * profile.spent.phases.get(name, 0.0)
        if width:
            label = f"{name} {width:.3g} ms"
            phases.barh(0, width, left=left, color=colors[name], label=label)
            left += width
    phases.set_yticks([])
    phases.set_xlabel("ms of a step")
    phases.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=8, frameon=False)
    rows = profile.modules()[:MODULES][::-1]
    names = [name or "(outside of modules)" for name, _ in rows]
    base = [0.0] * len(rows)
    for way, color in zip(PASSES, ("tab:blue", "tab:gray", "tab:orange")):
        values = [scale * ways[way] for _, ways in rows]
        modules.barh(names, values, left=base, color=color, label=way)
        base = [a + b for a, b in zip(base, values)]
    modules.set_xlabel("ms of a step, without modules within")
    modules.tick_params(axis="y", labelsize=8)
    modules.legend(loc="lower right", fontsize=8)
    if profile.timeline:
        memory.step(
            [1e3 * t for t, _ in profile.timeline], [size / 2**20 for _, size in profile.timeline], where="post"
        )
    memory.set_xlabel("ms since the first profiled step began")
    memory.set_ylabel("MiB allocated since")
    memory.grid(alpha=0.25)
    figure.suptitle(f"steps {profile.start} to {profile.start + profile.steps - 1}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
