"""What services tell the ledger about the life of tasks.

Read by gateways of other releases than the writer's, so unknown fields are ignored here and nowhere else.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

from pydantic import AwareDatetime, ConfigDict, Field, TypeAdapter

from taskmesh.contracts._base import Part


class TaskState(StrEnum):
    """The states of a task; see docs/task-lifecycle.md for every arrow."""

    SCHEDULED = "scheduled"
    """Waits in an outbox for its due time."""
    QUEUED = "queued"
    """Due; on its way to, or in, the service's queue."""
    RUNNING = "running"
    RETRYING = "retrying"
    """An attempt failed in a way that may pass; the next one is due at `due_at`."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    """Was not started before its `expires_at`."""

    @property
    def terminal(self) -> bool:
        return self in TERMINAL


TERMINAL = frozenset({TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELLED, TaskState.EXPIRED})


class TaskKind(StrEnum):
    COMMAND = "command"
    EVENT = "event"
    """The task is one listener's handling of one event."""


class TaskFailure(Part):
    """Why an attempt or a task failed; never holds a payload."""

    model_config = ConfigDict(extra="ignore")

    code: str
    """`TaskmeshError.code`, or one of: exception, poison, time_limit, malformed, worker_lost, outcome_lost."""
    message: Annotated[str, Field(max_length=2000)]
    exception: str | None = None
    """Qualified class name."""


class LifecycleEvent(Part):
    """One step in the life of one task."""

    model_config = ConfigDict(extra="ignore")

    task_id: UUID
    type: str
    state: TaskState
    at: AwareDatetime
    service: str
    kind: TaskKind = TaskKind.COMMAND
    sequence: int = 0
    """Orders attempts: replacements * 10000 + retries. A lower one never overrides a higher one."""
    attempt: int = 1
    """Counts starts from 1, as people do: one that ended in a crash counts as well."""
    root_id: UUID | None = None
    parent_id: UUID | None = None
    event_id: UUID | None = None
    """The event that a listener's task handles."""
    traceparent: str | None = None
    due_at: AwareDatetime | None = None
    expires_at: AwareDatetime | None = None
    started_at: AwareDatetime | None = None
    worker: str | None = None
    """`host:pid` of the process that ran the attempt."""
    result: Any = None
    failure: TaskFailure | None = None
    payload: dict[str, Any] | None = None
    """Of a task that failed: what it was asked to do, so that it can be retried although the gateway never saw it."""
    children: tuple[LifecycleEvent, ...] = ()
    """The tasks that this one has started, told with its outcome: so whoever sees it finished sees them too.

    A child of kind `event` is an event that was emitted: its `task_id` is the event's, and what becomes of it is one
    task for each service that listens.
    """


LIFECYCLE_BATCH: TypeAdapter[list[LifecycleEvent]] = TypeAdapter(list[LifecycleEvent])
"""The body of a lifecycle message: one JSON array, any number of tasks, one state."""
