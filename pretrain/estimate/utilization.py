"""MFU: the share of a ceiling that useful work reaches (model FLOPs utilization: PaLM, arXiv 2204.02311, appendix B).

A share above one is an error, not a number: no chip is faster than its datasheet, nor than the best product that was measured on
it, so the count, the clock or the ceiling is wrong, and whoever reads the number would believe it. What is done about it:

* the number is None, null in metrics.jsonl, as long as it lies above one;
* events.jsonl gets one line for each ceiling, of level error, that names the ceiling, the count, and what to do;
* training goes on: it is none the worse for a wrong figure about it. Commands whose whole point is figures (a run with a
  `profile` section, launch.plan) end with exit code 1.

All that a device computes is held against the ceiling, recomputation included: 90 % of useful work beside a third of
recomputation is as impossible as 120 %.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pretrain.estimate.flops import Work


@dataclass(frozen=True)
class Ceiling:
    """name: of the figure (mfu, mfu_measured). rate: FLOP/s; None where nobody knows. source: where that comes from. fix: what to
    do when it is exceeded."""

    name: str
    rate: float | None
    source: str
    fix: str


@dataclass(frozen=True)
class Impossible:
    """More than a ceiling allows. text: for people, with what to do."""

    ceiling: Ceiling
    work: Work
    seconds: float

    @property
    def text(self) -> str:
        rate = self.ceiling.rate or 0.0
        useful, every = self.work.useful, self.work.hardware
        more = f" ({useful:.4g} useful)" if every > useful else ""
        speed = f"{every / self.seconds / 1e12:.4g} TFLOP/s, more than the {rate / 1e12:.4g} {self.ceiling.source}"
        counted = f"{every:.4g} FLOPs{more} in {self.seconds:.4g} s are {speed}"
        return f"{self.ceiling.name} is an error, not a number: {counted}; {self.ceiling.fix}"


@dataclass
class Utilization:
    """Shares of ceilings, step by step. faulty: names of those that were exceeded."""

    ceilings: tuple[Ceiling, ...]
    faulty: set[str] = field(default_factory=set)

    def of(self, work: Work, seconds: float) -> tuple[dict[str, float | None], list[Impossible]]:
        """FLOPs of one device and the seconds they took -> (the share of each ceiling, what is to be told: each once)."""
        shares: dict[str, float | None] = {}
        news: list[Impossible] = []
        for ceiling in self.ceilings:
            shares[ceiling.name] = share(work, seconds, ceiling.rate)
            if ceiling.rate is not None and shares[ceiling.name] is None and ceiling.name not in self.faulty:
                self.faulty.add(ceiling.name)
                news.append(Impossible(ceiling, work, seconds))
        return shares, news


def share(work: Work, seconds: float, rate: float | None) -> float | None:
    """Useful work's share of what could be done at `rate` FLOP/s; None where that is not known, or where more was done."""
    if rate is None or work.hardware > rate * seconds:
        return None
    return work.useful / (rate * seconds)


def of_chip(nominal: float | None, measured: float, source: str) -> Utilization:
    """Against FLOP/s by the datasheet in the hardware file `source` (None: not known), and against those that were measured."""
    return Utilization(
        (
            Ceiling(
                "mfu",
                nominal,
                f"that {source} says the chip can do",
                "give the file of this chip and precision (hardware=...)",
            ),
            Ceiling(
                "mfu_measured",
                measured,
                "that products were measured to reach",
                "measure it while nothing else runs here: python -m kernels.bench hardware --write, and hardware=...",
            ),
        )
    )
