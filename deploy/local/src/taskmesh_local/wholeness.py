"""Whether traces are whole: every parent is there, no span is two, and equal requests have equal spans.

Nobody says here which spans a request has. What most requests of a kind have is taken for what all of them must have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

Shape = frozenset[tuple[str, int]]
"""How many spans of each name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What is looked at of a span; a root's `parent_id` is empty."""

    span_id: str
    parent_id: str
    name: str
    start: float = 0.0

    @classmethod
    def from_json(cls, span: Mapping[str, Any]) -> Self:
        """A span as the trace page's JSON has it."""
        return cls(
            span_id=span["span_id"], parent_id=span["parent_id"] or "", name=span["name"], start=span["start_ms"]
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found among traces.

    Attributes:
        kinds: How many traces there are of each kind.
        shapes: The shape that most traces of a kind have.
        broken: What is wrong, by trace.
    """

    kinds: Mapping[str, int]
    shapes: Mapping[str, Shape]
    broken: Mapping[str, Sequence[str]]

    @property
    def shape_count(self) -> int:
        """How many different shapes there are."""
        return len(set(self.shapes.values()))


def compare(traces: Mapping[str, Sequence[Seen]], kinds: Mapping[str, str]) -> Comparison:
    """Hold traces against each other.

    Args:
        traces: Their spans, by trace; linked traces are traces of their own.
        kinds: What each trace should have in common with others, such as the type of its request and its outcome. A
            trace that is only here has not come.
    """
    shapes = {kind: _usual(kind, traces, kinds) for kind in sorted(set(kinds.values()))}
    broken = {}
    for trace_id, kind in kinds.items():
        spans = traces.get(trace_id, ())
        faults = [*faults_within(spans), *differences(shape_of(spans), shapes[kind])] if spans else ["no span has come"]
        if faults:
            broken[trace_id] = faults
    return Comparison(Counter(kinds.values()), shapes, broken)


def shape_of(spans: Iterable[Seen]) -> Shape:
    """How many spans of each name."""
    return frozenset(Counter(span.name for span in spans).items())


def faults_within(spans: Sequence[Seen]) -> list[str]:
    """What is wrong with a trace by itself."""
    known = Counter(span.span_id for span in spans)
    faults = [f"{span.name} is an orphan" for span in orphans(spans)]
    faults += [f"span {span_id} is there {count} times" for span_id, count in known.items() if count > 1]
    roots = sorted(span.name for span in spans if not span.parent_id)
    if len(roots) > 1:
        faults.append(f"{len(roots)} roots: {', '.join(roots)}")
    return faults


def orphans(spans: Sequence[Seen]) -> list[Seen]:
    """The spans whose parent is missing."""
    known = {span.span_id for span in spans}
    return [span for span in spans if span.parent_id and span.parent_id not in known]


def differences(shape: Shape, usual: Shape) -> list[str]:
    """What a trace has too few and too many of, in words."""
    found, wanted = dict(shape), dict(usual)
    return [
        f"{found.get(name, 0)} of {name} in place of {wanted.get(name, 0)}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name, 0) != wanted.get(name, 0)
    ]


def _usual(kind: str, traces: Mapping[str, Sequence[Seen]], kinds: Mapping[str, str]) -> Shape:
    """The shape that most traces of a kind have; of two as frequent ones the larger: spans are lost, not made."""
    mine = [trace_id for trace_id, its in kinds.items() if its == kind and trace_id in traces]
    shapes = Counter(shape_of(traces[trace_id]) for trace_id in mine)
    return max(shapes, key=lambda shape: (shapes[shape], sum(count for _, count in shape)), default=frozenset())
