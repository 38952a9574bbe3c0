"""The rule files of Prometheus: what they record, and what they alert of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from taskmesh_observability.promql import Labels, labels_of

FOLDER: Final = Path(__file__).parents[2] / "prometheus" / "rules"

ALERTS: Final[Labels] = frozenset({"alertname", "alertstate", "severity", "burn", "objective"})
"""Labels of Prometheus' own series ALERTS, besides those of the alert's expression."""

_QUOTED: Final = re.compile(r"\$labels\.(\w+)")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: it records a series, or it alerts.

    Attributes:
        name: Of the series, or of the alert.
    """

    name: str
    is_alert: bool
    expression: str
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Rule:
        name = entry.get("alert") or entry["record"]
        return cls(name, "alert" in entry, entry["expr"], entry.get("labels", {}), entry.get("annotations", {}))

    @property
    def quoted(self) -> set[str]:
        """The labels that its annotations quote."""
        return {label for text in self.annotations.values() for label in _QUOTED.findall(text)}


def rules(folder: Path = FOLDER) -> Sequence[Rule]:
    """Every rule of the files, those that record first: alerts build on them."""
    files = [yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*.yml"))]
    entries = [entry for file in files for group in file["groups"] for entry in group["rules"]]
    return sorted((Rule.of(entry) for entry in entries), key=lambda rule: rule.is_alert)


def with_recorded(known: Mapping[str, Labels], every: Iterable[Rule]) -> Mapping[str, Labels]:
    """The series there are with those that the rules record, and ALERTS.

    Raises:
        Unsound: A rule that records builds on something that does not exist, or is recorded further down.
    """
    everything = dict(known)
    for name, labels in _recorded(everything, every):
        everything[name] = everything.get(name, frozenset()) | labels
    alerts = frozenset().union(*everything.values()) | ALERTS
    return everything | {"ALERTS": alerts}


def _recorded(known: Mapping[str, Labels], every: Iterable[Rule]) -> Iterator[tuple[str, Labels]]:
    for rule in every:
        if not rule.is_alert:
            yield rule.name, (labels_of(rule.expression, known) or frozenset()) | frozenset(rule.labels)
