"""The spans that a campaign has collected, and what is missing among them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from sys import intern
from typing import Any
from uuid import UUID

from taskmesh.parts.spans import Span
from taskmesh_local.faults.killed import Killed

DELAY_SECONDS = 0.5
"""How long a span waits in its process, see `options.VARIABLES`."""
SLACK_SECONDS = 10.0
"""Beyond that: for a batch on its way to a collector that is slow. An export gives up after so long."""

SUBMITTER = "gateway-api"
LONGEST_PARENT_SECONDS = 10.0
"""What submits a task ends so long after the task was written, at the latest."""

MOST = 0.9
"""The part of the tasks of a type, with the same end, that have a span which then all of them must have."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What is kept of a span; there may be a million."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    role: str
    task_id: str | None
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Gap:
    """Something that is missing.

    Attributes:
        what: In words.
        roles: The roles that may have made it.
        begin, end: When it must have been made, in seconds of the epoch.
    """

    what: str
    roles: frozenset[str]
    begin: float
    end: float

    def victims(self, killed: Iterable[Killed]) -> list[Killed]:
        """The processes that may have taken it along."""
        window = DELAY_SECONDS + SLACK_SECONDS
        return [it for it in killed if it.role in self.roles and it.since - window <= self.end and self.begin <= it.at]


def compact(spans: Iterable[Span]) -> Iterator[Collected]:
    """What is kept of spans; background work, which is the root of a trace of its own, is left out."""
    for span in spans:
        task_id = span.attributes.get("taskmesh.task.id")
        if not span.parent_id and span.kind in {"consumer", "producer"} and task_id is None:
            continue
        # "billing-worker" makes spans in the roles "worker" and "relay".
        role = f"{span.service.removesuffix('-worker')}-{span.resource.get('taskmesh.role')}"
        yield Collected(
            trace_id=span.trace_id,
            span_id=span.span_id,
            parent_id=span.parent_id,
            name=intern(span.name),
            role=intern(role),
            task_id=task_id,
            start=span.start_nanoseconds,
            end=span.end_nanoseconds,
        )


class Traces:
    """Spans of one campaign.

    Attributes:
        spans: Each once.
        twice: Span ids that stand for two different spans.
        repeated: How many spans came again as they were.
    """

    def __init__(self, spans: Iterable[Collected]) -> None:
        self.spans: dict[tuple[str, str], Collected] = {}
        self.twice: list[str] = []
        self.repeated = 0
        for span in spans:
            known = self.spans.setdefault((span.trace_id, span.span_id), span)
            if known is not span:
                self.repeated += known == span
                self.twice += [] if known == span else [f"{span.span_id} {known.name} and {span.name}"]

    @property
    def count(self) -> int:
        """How many traces there are."""
        return len({trace_id for trace_id, _ in self.spans})

    def orphans(self, tasks: Mapping[UUID, Any]) -> list[tuple[str, Gap]]:
        """Parents that are missing, by their trace.

        Args:
            tasks: Of the ledger.
        """
        parents = self._roles_of_parents()
        begun: dict[str, int] = {}
        for span in self.spans.values():
            begun[span.trace_id] = min(span.start, begun.get(span.trace_id, span.start))
        found = []
        for span in self.spans.values():
            if span.parent_id and (span.trace_id, span.parent_id) not in self.spans:
                # An event may have waited in its outbox for as long as its relay was stopped.
                begin, end = begun[span.trace_id] / 1e9, span.start / 1e9
                if span.task_id and (task := tasks.get(UUID(span.task_id))):
                    # It may run an hour after it was asked for, and what has asked ended then.
                    begin = task.created_at.timestamp()
                    end = min(end, begin + LONGEST_PARENT_SECONDS)
                found.append((span.trace_id, Gap(f"the parent of {span.name}", parents[span.name], begin, end)))
        return found

    def gaps(self, tasks: Mapping[UUID, Any]) -> list[tuple[UUID, Gap]]:
        """Spans that tasks lack and most others of their type and end have.

        Args:
            tasks: Of the ledger.
        """
        names = self._names_by_task()
        roles = self._roles_by_name()
        alike: dict[tuple[str, str], list[UUID]] = defaultdict(list)
        for task in tasks.values():
            # What was cancelled or has expired was so at any stage.
            if task.state in {"succeeded", "failed"}:
                alike[task.type, task.state].append(task.id)
        found = []
        for ids in alike.values():
            usual = Counter(name for task_id in ids for name in names.get(str(task_id), ()))
            wanted = {name for name, count in usual.items() if count > MOST * len(ids)}
            for task_id in ids:
                begin, end = (getattr(tasks[task_id], moment).timestamp() for moment in ("created_at", "finished_at"))
                missing = sorted(wanted - names.get(str(task_id), set()))
                found += [(task_id, Gap(name, roles[name], begin, end)) for name in missing]
        return found

    def _names_by_task(self) -> dict[str, set[str]]:
        """The names of each task's spans: those that name it, and what is below them.

        Requests are left out: one may be about many tasks, and that it is there is known by its children.
        """
        names: dict[str, set[str]] = defaultdict(set)
        for span in self.spans.values():
            if span.role != SUBMITTER and (task_id := self._task_of(span)) is not None:
                names[task_id].add(span.name)
        return names

    def _task_of(self, span: Collected | None) -> str | None:
        seen: set[str] = set()
        while span is not None and span.task_id is None and span.span_id not in seen:
            seen.add(span.span_id)
            span = self.spans.get((span.trace_id, span.parent_id))
        return span.task_id if span else None

    def _roles_by_name(self) -> dict[str, frozenset[str]]:
        roles: dict[str, set[str]] = defaultdict(set)
        for span in self.spans.values():
            roles[span.name].add(span.role)
        return {name: frozenset(found) for name, found in roles.items()}

    def _roles_of_parents(self) -> Mapping[str, frozenset[str]]:
        """Which roles make the parents of the spans of a name."""
        roles: dict[str, set[str]] = defaultdict(set)
        for span in self.spans.values():
            if parent := self.spans.get((span.trace_id, span.parent_id)):
                roles[span.name].add(parent.role)
        return defaultdict(frozenset, {name: frozenset(found) for name, found in roles.items()})


def tell_apart(gaps: Sequence[tuple[Any, Gap]], killed: Sequence[Killed]) -> tuple[list[str], dict[Any, list[Killed]]]:
    """Gaps that nothing explains, in words, and by task or trace the processes that explain the others."""
    unexplained, explained = [], {}
    for whose, gap in gaps:
        if victims := gap.victims(killed):
            explained[whose] = victims
        else:
            unexplained.append(f"{whose} lacks {gap.what} of {', '.join(sorted(gap.roles)) or 'nobody known'}")
    return unexplained, explained
