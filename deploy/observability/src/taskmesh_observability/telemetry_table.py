"""The metrics that docs/telemetry.md promises, by the names that Prometheus gives them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

TARGET_LABELS: Final = frozenset({"job", "instance", "taskmesh_role"})
"""What every series has, whichever way it came: from the scrape configuration, or from the collector."""

_UNITS: Final = {"s": "_seconds"}
_COLUMNS: Final = ["metric", "instrument", "unit", "attributes"]
_NAME: Final = re.compile(r"`([a-z][a-z0-9_.]*)`")


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table.

    Attributes:
        name: OpenTelemetry's, with dots.
        kind: `counter`, `gauge` or `histogram`.
        labels: Those of its attributes, as Prometheus writes them.
    """

    name: str
    kind: str
    unit: str
    labels: frozenset[str]

    @property
    def series(self) -> Iterator[tuple[str, frozenset[str]]]:
        """The names under which Prometheus keeps it, with the labels of each."""
        base = self.name.replace(".", "_") + _UNITS.get(self.unit, "")
        labels = self.labels | TARGET_LABELS
        match self.kind:
            case "counter":
                yield f"{base}_total", labels
            case "histogram":
                yield f"{base}_bucket", labels | {"le"}
                yield f"{base}_sum", labels
                yield f"{base}_count", labels
            case _:
                yield base, labels


def metrics(page: str) -> Iterator[Metric]:
    """Every metric in the table of the page's section "Metrics".

    Raises:
        ValueError: There is no such table.
    """
    section = page.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in row.split("|")] for row in re.findall(r"^\| (.*) \|$", section, re.MULTILINE)]
    if not rows or rows[0][:4] != _COLUMNS:
        raise ValueError(f"docs/telemetry.md has no table of metrics that begins with {', '.join(_COLUMNS)}")
    for name, kind, unit, attributes, *_ in rows[1:]:
        labels = frozenset(found.replace(".", "_") for found in _NAME.findall(attributes))
        yield Metric(name.strip("`"), kind, unit.strip("`"), labels)


def series(page: str) -> Mapping[str, frozenset[str]]:
    """Every name that Prometheus knows, with its labels."""
    return {name: labels for metric in metrics(page) for name, labels in metric.series}
