"""Traces as text: what a test expects of one is written as a person would draw it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from taskmesh.testing.otlp import Span

SHOWN = {
    "taskmesh.task.attempt": "#{}",
    "taskmesh.outcome": "{}",
    "taskmesh.retry.reason": "after {}",
    "taskmesh.transaction.outcome": "{}",
    "error.type": "!{}",
}
"""Attributes that tell spans of one name apart."""


def draw(spans: Iterable[Span]) -> str:
    """One line for each span, children below their parents and siblings in the order of their lines.

    A span whose parent is missing is marked `orphan`, one that came twice `twice`.
    """
    found = list(spans)
    known = {span.span_id for span in found}
    times = Counter(span.span_id for span in found)
    children: dict[str, list[Span]] = defaultdict(list)
    for span in {span.span_id: span for span in found}.values():
        children[span.parent_id if span.parent_id in known else ""].append(span)

    def lines(parent: str, depth: int) -> list[str]:
        drawn: list[str] = []
        for span in sorted(children[parent], key=_line):
            orphan = " orphan" if span.parent_id and span.parent_id not in known else ""
            twice = " twice" if times[span.span_id] > 1 else ""
            drawn.append("  " * depth + _line(span) + orphan + twice)
            drawn += lines(span.span_id, depth + 1)
        return drawn

    return "\n".join(lines("", 0))


def _line(span: Span) -> str:
    facts = [form.format(span.attributes[name]) for name, form in SHOWN.items() if name in span.attributes]
    return " ".join([f"{span.service}: {span.name}", *facts])
