"""A trace in one line: what the list shows and searches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from taskmesh_local import attempts
from taskmesh_local.attempts import Interval, Mark

WORK = "work"
READ = "read"
BATCH = "batch"


@dataclass(frozen=True, slots=True)
class Overview:
    """One trace.

    Attributes:
        sort: `work`; `read` for a request that only reads and did not fail; `batch` for messages of many traces.
        begun, ended: In nanoseconds since 1970, the waits of its tasks included.
        running: Nanoseconds in which a task ran.
        waiting: Nanoseconds in which a task waited, and none ran.
        errors: Failed spans.
        orphans: Spans whose parent has not come, except those that were sampled late: theirs never comes.
        late: Attempts that were sampled late.
        retries: Attempts after the first.
        tasks: Tasks that were attempted.
        state: `failed` if a task or the request failed for good, `retrying` if a task's next attempt is still to come,
            `cancelled` if one was; `succeeded` if every task did, `recovered` if that took more than one try; empty if
            the spans do not say.
        name, service: Of the root, or of the first span while the root is missing.
        task: The type of the first task that a span names.
    """

    trace_id: str
    sort: str
    begun: int
    ended: int
    running: int
    waiting: int
    spans: int
    errors: int
    orphans: int
    late: int
    retries: int
    tasks: int
    state: str
    services: tuple[str, ...]
    name: str
    service: str
    task: str

    def to_json(self) -> dict[str, Any]:
        """As the JSON API and the templates have it, with times a person can read."""
        shown = asdict(self) | {"services": list(self.services)}
        for name in ("begun", "ended", "running", "waiting"):
            del shown[name]
        return shown | {
            "started_at": moment(self.begun),
            "duration_ms": (self.ended - self.begun) / 1e6,
            "running_ms": self.running / 1e6,
            "waiting_ms": self.waiting / 1e6,
        }


def moment(nanoseconds: int) -> str:
    """An instant in UTC, to the millisecond."""
    at = datetime.fromtimestamp(nanoseconds / 1e9, UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def overview(trace_id: str, marks: Sequence[Mark]) -> Overview:
    """Sum up the spans that have come of a trace, in whatever order they came."""
    ordered = sorted(marks, key=lambda each: (each.begun, each.parent_id != ""))
    root = min(ordered, key=lambda each: each.parent_id != "")
    tries = [each for each in ordered if each.is_attempt]
    tasks = attempts.by_task(ordered)
    ran = [Interval(each.begun, each.ended) for each in tries]
    waited = [Interval(each.waited_from, each.begun) for each in tries]
    known = {each.span_id for each in ordered}
    errors = sum(each.failed for each in ordered)
    return Overview(
        trace_id=trace_id,
        sort=_sort(root, ordered, errors),
        begun=min(min(each.begun, each.waited_from) for each in ordered),
        ended=max(each.ended for each in ordered),
        running=attempts.length(ran),
        waiting=attempts.length([*waited, *attempts.retry_delays(tries).values()], without=ran),
        spans=len(ordered),
        errors=errors,
        orphans=sum(bool(each.parent_id) and each.parent_id not in known and not each.late for each in ordered),
        late=sum(each.late for each in ordered),
        retries=sum(each.attempt > 1 and each.outcome != attempts.REPEATED for each in tries),
        tasks=len(tasks),
        state=_state(root, list(tasks.values()), errors),
        services=tuple(dict.fromkeys(each.service for each in ordered)),
        name=root.name,
        service=root.service,
        task=next((each.task_type for each in ordered if each.task_type), "") or _consumed(ordered),
    )


def _sort(root: Mark, marks: Sequence[Mark], errors: int) -> str:
    if root.batch:
        return BATCH
    return READ if root.name.startswith("GET ") and len(marks) == 1 and not errors else WORK


def _state(root: Mark, tasks: list[list[Mark]], errors: int) -> str:
    ends = {attempts.state_of(task) for task in tasks}
    if ends & attempts.BAD_ENDS or (errors and (root.failed or not tasks)):
        return "failed"
    for unfinished in ("retrying", "cancelled"):
        if unfinished in ends:
            return unfinished
    if ends != {"succeeded"}:
        return ""
    return "recovered" if errors else "succeeded"


def _consumed(marks: Sequence[Mark]) -> str:
    """What spans that name no task have processed."""
    names = (each.name for each in marks if each.kind == "consumer" and each.parent_id)
    return next(names, "").removeprefix("process ")
