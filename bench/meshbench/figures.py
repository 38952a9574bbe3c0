"""What is made of measurements: percentiles of one turn, medians and ranges over turns, ratios between contestants."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Figures = Mapping[str, float]
"""What one turn of one contestant came to, by name. Dotted names tell of one process: `cpu.api`, `mib.worker`."""

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9, "max": 100.0}


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that `share` percent of all do not exceed (nearest rank); it was measured, not interpolated.

    Args:
        ordered: Ascending, at least one.
        share: Above 0, at most 100.
    """
    return ordered[max(1, math.ceil(len(ordered) * share / 100)) - 1]


def latencies(seconds: Sequence[float], prefix: str = "") -> dict[str, float]:
    """Percentiles in milliseconds: `p50`, `p90`, `p95`, `p99`, `p999` and `max`; nothing of nothing."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    return {f"{prefix}{name}": 1000 * percentile(ordered, share) for name, share in PERCENTILES.items()}


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over several turns."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


def spreads(turns: Sequence[Figures]) -> dict[str, Spread]:
    """Each figure over the turns that have it."""
    names = dict.fromkeys(name for turn in turns for name in turn)
    return {name: Spread.of([turn[name] for turn in turns if name in turn]) for name in names}


def ratio(turns: Mapping[str, Sequence[Figures]], figure: str, ours: str, theirs: str) -> Spread | None:
    """Ours by theirs: the ratio of the medians, and how far the ratios within a round lie apart.

    None where one of the two has no such figure.
    """
    mine = [turn[figure] for turn in turns[ours] if figure in turn]
    others = [turn[figure] for turn in turns[theirs] if figure in turn]
    if not mine or not others or 0 in others:
        return None
    pairs = [one / other for one, other in zip(mine, others, strict=False)]
    return Spread(statistics.median(mine) / statistics.median(others), min(pairs), max(pairs))
