"""What the spans of a trace say about its tasks: each attempt, what it waited for, and how it ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from taskmesh.parts.spans import Span

# What an attempt waits for, from last to first: the event that begins the wait, and the attribute with its length.
WAITS = (
    ("prefetch", "received", "taskmesh.prefetch.dwell_ms"),
    ("broker", "published", "taskmesh.broker.dwell_ms"),
    ("outbox", "due", "taskmesh.outbox.dwell_ms"),
)
RETRY = "retry"
"""The wait between the end of an attempt and the moment at which the next one is due."""
BAD_ENDS = frozenset({"failed", "dead-lettered", "rejected"})
# Deliveries of an attempt that another one has settled.
REPEATED = "duplicate"


class Interval(NamedTuple):
    """A stretch of time in nanoseconds since 1970."""

    begun: int
    ended: int


@dataclass(frozen=True, slots=True)
class Wait:
    """One reason for which an attempt did not run yet: `retry`, `outbox`, `broker` or `prefetch`."""

    kind: str
    begun: int
    ended: int


class Mark(NamedTuple):
    """What the storage keeps of each span in columns: enough to sum up a trace without reading the spans.

    Attributes:
        waited_from: When the wait before the span began; its own beginning where nothing is known of a wait.
        task_id, attempt, outcome: Of attempts; empty on other spans.
        task_type: Of attempts, and of what has submitted a task.
        late: Exported by a worker although the trace was not sampled.
        batch: Carries messages of many traces.
    """

    span_id: str
    parent_id: str
    service: str
    name: str
    kind: str
    begun: int
    ended: int
    failed: bool
    waited_from: int
    task_id: str
    task_type: str
    attempt: int
    outcome: str
    late: bool
    batch: bool

    @property
    def is_attempt(self) -> bool:
        return bool(self.task_id)


def mark(span: Span) -> Mark:
    """The columns of a span."""
    attempt = is_attempt(span)
    waits = waits_of(span)
    text = {name: str(span.attributes.get(f"taskmesh.{name}", "")) for name in ("task.id", "task.type", "outcome")}
    return Mark(
        span_id=span.span_id,
        parent_id=span.parent_id,
        service=span.service,
        name=span.name,
        kind=span.kind,
        begun=span.start_nanoseconds,
        ended=span.end_nanoseconds,
        failed=span.failed,
        waited_from=waits[0].begun if waits else span.start_nanoseconds,
        task_id=text["task.id"] if attempt else "",
        task_type=text["task.type"],
        attempt=number_of(span) if attempt else 0,
        outcome=text["outcome"] if attempt else "",
        late=span.attributes.get("taskmesh.sampled_late") is True,
        batch=not span.parent_id and (span.kind == "consumer" or "messaging.batch.message_count" in span.attributes),
    )


def is_attempt(span: Span) -> bool:
    """Whether the span is one delivery of one task."""
    return span.kind == "consumer" and "taskmesh.task.id" in span.attributes


def number_of(span: Span) -> int:
    """Which attempt this is, from 1."""
    number = span.attributes.get("taskmesh.task.attempt", 1)
    return number if isinstance(number, int) else 1


def waits_of(span: Span) -> tuple[Wait, ...]:
    """What the attempt waited for between being due and beginning, in the order of time.

    Its events say when; where one is missing, the attribute with the length of the wait stands in. Clocks of several
    machines differ, so a wait that would end before it began is left out.
    """
    if not is_attempt(span):
        return ()
    at = {event["name"]: int(event["at_nanoseconds"]) for event in span.events}
    waits: list[Wait] = []
    ended = span.start_nanoseconds
    for kind, event, attribute in WAITS:
        dwell = span.attributes.get(attribute)
        begun = at.get(event, ended - int(dwell * 1e6) if isinstance(dwell, int | float) else None)
        if begun is None:
            break
        if begun < ended:
            waits.append(Wait(kind, begun, ended))
            ended = begun
    return tuple(reversed(waits))


def retry_delays(marks: Iterable[Mark]) -> dict[str, Interval]:
    """The time between two attempts of one task, by the span of the later one."""
    delays = {}
    last: dict[str, Mark] = {}
    for each in sorted((each for each in marks if each.is_attempt), key=lambda each: each.begun):
        before = last.get(each.task_id)
        if before and before.attempt < each.attempt and before.ended < each.waited_from:
            delays[each.span_id] = Interval(before.ended, each.waited_from)
        last[each.task_id] = each
    return delays


def state_of(attempts: Sequence[Mark]) -> str:
    """How the task stands after these attempts, in the words of `taskmesh.outcome`; empty if they do not say."""
    told = [each for each in attempts if each.outcome != REPEATED]
    if not told:
        return ""
    last = max(told, key=lambda each: (each.attempt, each.ended))
    return last.outcome or ("failed" if last.failed else "")


def by_task(marks: Iterable[Mark]) -> dict[str, list[Mark]]:
    """The attempts of each task, both in the order in which they began."""
    tasks: dict[str, list[Mark]] = {}
    for each in sorted((each for each in marks if each.is_attempt), key=lambda each: (each.begun, each.attempt)):
        tasks.setdefault(each.task_id, []).append(each)
    return tasks


def length(intervals: Iterable[Interval], *, without: Iterable[Interval] = ()) -> int:
    """How many nanoseconds the intervals cover together, leaving out what `without` covers."""
    holes = _merged(without)
    return sum(
        interval.ended
        - interval.begun
        - sum(max(0, min(hole.ended, interval.ended) - max(hole.begun, interval.begun)) for hole in holes)
        for interval in _merged(intervals)
    )


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for interval in sorted(intervals):
        if merged and interval.begun <= merged[-1].ended:
            merged[-1] = Interval(merged[-1].begun, max(merged[-1].ended, interval.ended))
        else:
            merged.append(interval)
    return merged
