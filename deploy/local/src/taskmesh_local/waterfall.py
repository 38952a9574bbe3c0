"""A trace as a waterfall: its spans as a tree, each at its place in time, with the attempts of a task side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from taskmesh.parts.spans import Span
from taskmesh_local import attempts
from taskmesh_local.attempts import RETRY, Mark, Wait
from taskmesh_local.overview import Overview


@dataclass(frozen=True, slots=True)
class Bar:
    """A stretch of the waterfall, in milliseconds from the trace's beginning."""

    kind: str
    start_ms: float
    duration_ms: float


@dataclass(frozen=True, slots=True)
class Row:
    """A span at its place in the tree and in time.

    Attributes:
        depth: 0 for a root.
        below: How many rows follow that belong to this one.
        orphan: Whether its parent should be here and is not.
        late: Whether it was exported although the trace was not sampled, so that its parent will never be here.
        waits: What it waited for before it began, in the order of time; empty for all but attempts.
        number: Which attempt of its task it is; 0 for all other spans.
        grouped: Whether it stands below the row of its task, beside other attempts.
        task: The task of an attempt.
    """

    span: Span
    depth: int
    below: int
    orphan: bool
    late: bool
    run: Bar
    waits: tuple[Bar, ...]
    number: int
    outcome: str
    task: str
    grouped: bool

    @property
    def start_ms(self) -> float:
        return self.run.start_ms

    @property
    def duration_ms(self) -> float:
        return self.run.duration_ms

    @property
    def waited_ms(self) -> float:
        """Since the attempt before ended, if there is one in the trace; else since it was due."""
        return sum(wait.duration_ms for wait in self.waits)

    @property
    def reason(self) -> str:
        """Why there is this attempt: the code of the failure of the one before."""
        return str(self.span.attributes.get("taskmesh.retry.reason", ""))

    @property
    def error(self) -> str:
        """What made it fail, in the shortest words there are."""
        return self.span.message or str(self.span.attributes.get("error.type", "")) if self.span.failed else ""

    def to_json(self) -> dict[str, Any]:
        """The span, its place and its waits."""
        shown = asdict(self.span)
        for name in ("trace_id", "start_nanoseconds", "end_nanoseconds"):
            del shown[name]
        return shown | {
            "depth": self.depth,
            "start_ms": self.start_ms,
            "duration_ms": self.duration_ms,
            "waited_ms": self.waited_ms,
            "waits": [asdict(wait) for wait in self.waits],
            "orphan": self.orphan,
            "sampled_late": self.late,
        }


@dataclass(frozen=True, slots=True)
class Group:
    """The row above the attempts of a task that has more than one.

    Attributes:
        depth: Of the row; the attempts are one deeper.
        below: How many rows follow that belong to the task.
    """

    task: Task
    depth: int
    below: int


@dataclass(frozen=True, slots=True)
class Task:
    """A task of the trace, with every attempt at it that has come; none, when it is run in another trace.

    Attributes:
        state: As `taskmesh.outcome` of the last attempt says; empty if it says nothing.
    """

    id: str
    type: str
    state: str
    attempts: tuple[Row, ...]

    @property
    def ran_ms(self) -> float:
        return sum(row.duration_ms for row in self.attempts)

    @property
    def waited_ms(self) -> float:
        return sum(row.waited_ms for row in self.attempts)

    def to_json(self) -> dict[str, Any]:
        """The task and, in short, its attempts."""
        return {
            "id": self.id,
            "type": self.type,
            "state": self.state,
            "waited_ms": self.waited_ms,
            "ran_ms": self.ran_ms,
            "attempts": [
                {
                    "number": row.number,
                    "span_id": row.span.span_id,
                    "outcome": row.outcome,
                    "reason": row.reason,
                    "waited_ms": row.waited_ms,
                    "ran_ms": row.duration_ms,
                }
                for row in self.attempts
            ],
        }


@dataclass(frozen=True, slots=True)
class Waterfall:
    """What the page of a trace draws."""

    rows: tuple[Row | Group, ...]
    tasks: tuple[Task, ...]
    whole_ms: float

    @property
    def spans(self) -> list[Row]:
        """The rows that are spans: each behind its parent, siblings by their beginning."""
        return [row for row in self.rows if isinstance(row, Row)]

    @property
    def waits(self) -> set[str]:
        """For what anything has waited, as far as the spans tell."""
        return {wait.kind for row in self.spans for wait in row.waits}

    @property
    def ticks(self) -> list[float]:
        """Where the axis has its marks, in milliseconds: round numbers, four to nine of them."""
        step = _round_step(self.whole_ms / 5)
        return [step * number for number in range(math.floor(self.whole_ms / step) + 1)]


def waterfall(trace: Overview, spans: Sequence[Span]) -> Waterfall:
    """Lay out a trace."""
    marks = {span.span_id: attempts.mark(span) for span in spans}
    rows = _Layout(trace.begun, spans, marks).rows()
    by_id = {row.span.span_id: row for row in rows if isinstance(row, Row)}
    tasks = {task: Task(task, type_name, "", ()) for task, type_name in _named(spans)}
    tasks |= {task: _task(tries, by_id) for task, tries in attempts.by_task(marks.values()).items()}
    placed = (replace(row, task=tasks[row.task.id]) if isinstance(row, Group) else row for row in rows)
    return Waterfall(tuple(placed), tuple(tasks.values()), (trace.ended - trace.begun) / 1e6 or 1.0)


def _named(spans: Iterable[Span]) -> Iterator[tuple[str, str]]:
    """Every task that a span names together with its type: the attempts, and what has submitted it."""
    for span in spans:
        task_id, type_name = (span.attributes.get(f"taskmesh.task.{name}") for name in ("id", "type"))
        if task_id and type_name:
            yield str(task_id), str(type_name)


def _task(tries: Sequence[Mark], rows: Mapping[str, Row]) -> Task:
    placed = tuple(rows[each.span_id] for each in tries)
    return Task(tries[0].task_id, tries[0].task_type, attempts.state_of(tries), placed)


class _Layout:
    """The tree of a trace, read out depth first."""

    def __init__(self, begun: int, spans: Sequence[Span], marks: Mapping[str, Mark]) -> None:
        self._begun = begun
        self._marks = marks
        self._delays = attempts.retry_delays(marks.values())
        self._children: dict[str, list[Span]] = {}
        for span in sorted(spans, key=lambda span: (span.start_nanoseconds, span.parent_id != "")):
            # A span whose parent is missing starts a tree of its own.
            self._children.setdefault(span.parent_id if span.parent_id in marks else "", []).append(span)

    def rows(self) -> list[Row | Group]:
        """Every row behind the one it belongs to; how many belong to it is counted once all are there."""
        rows: list[Row | Group] = []
        waiting = self._siblings("", 0)
        while waiting:
            row = waiting.pop()
            rows.append(row)
            if isinstance(row, Row):
                waiting += self._siblings(row.span.span_id, row.depth + 1)
        return _counted(rows)

    def _siblings(self, parent_id: str, depth: int) -> list[Row | Group]:
        """The rows below a span, the last one first."""
        spans = self._children.get(parent_id, [])
        tries: dict[str, list[Span]] = {}
        for span in spans:
            if task_id := self._marks[span.span_id].task_id:
                tries.setdefault(task_id, []).append(span)
        rows: list[Row | Group] = []
        for span in spans:
            mark = self._marks[span.span_id]
            together = tries.get(mark.task_id, [])
            if len(together) < 2:
                rows.append(self._row(span, depth))
            elif together[0] is span:
                # The attempts come where the first one of them began.
                rows.append(Group(Task(mark.task_id, mark.task_type, "", ()), depth, 0))
                rows += [self._row(each, depth + 1, grouped=True) for each in together]
        rows.reverse()
        return rows

    def _row(self, span: Span, depth: int, *, grouped: bool = False) -> Row:
        mark = self._marks[span.span_id]
        return Row(
            span=span,
            depth=depth,
            below=0,
            orphan=bool(span.parent_id) and span.parent_id not in self._marks and not mark.late,
            late=mark.late,
            run=self._bar("run", span.start_nanoseconds, span.end_nanoseconds),
            waits=tuple(self._bar(wait.kind, wait.begun, wait.ended) for wait in self._waits(span)),
            number=mark.attempt,
            outcome=mark.outcome,
            task=mark.task_id,
            grouped=grouped,
        )

    def _waits(self, span: Span) -> Iterator[Wait]:
        if delay := self._delays.get(span.span_id):
            yield Wait(RETRY, *delay)
        yield from attempts.waits_of(span)

    def _bar(self, kind: str, begun: int, ended: int) -> Bar:
        return Bar(kind, (begun - self._begun) / 1e6, (ended - begun) / 1e6)


def _counted(rows: Iterable[Row | Group]) -> list[Row | Group]:
    """The rows with `below`, counted from the end: a row ends where the next one is that is no deeper."""
    counted: list[Row | Group] = []
    below: dict[int, int] = {}
    for row in reversed(list(rows)):
        mine = below.pop(row.depth + 1, 0)
        below[row.depth] = below.get(row.depth, 0) + 1 + mine
        counted.append(replace(row, below=mine))
    counted.reverse()
    return counted


def _round_step(about: float) -> float:
    """The nearest of 1, 2, 5, 10, 20, ... and their fractions."""
    power = 10.0 ** math.floor(math.log10(about))
    return min((power * factor for factor in (1, 2, 5, 10)), key=lambda step: abs(step - about))
