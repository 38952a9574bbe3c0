"""What the gateway answers, as frozen typed values.

Unknown fields are ignored, so that an older client works with a newer gateway.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from taskmesh.contracts.lifecycle import TaskKind, TaskState


class Result(BaseModel):
    """A frozen answer."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class TaskError(Result):
    """Why a task failed, or why its last attempt did."""

    code: str
    message: str = ""
    exception: str | None = None


class Task(Result):
    """A task as the ledger shows it."""

    id: UUID
    type: str
    kind: TaskKind = TaskKind.COMMAND
    state: TaskState
    attempt: int = 0
    """Runs begun so far, the current one included."""
    service: str | None = None
    payload: Any = None
    result: Any = None
    error: TaskError | None = None
    priority: int | None = None
    tags: tuple[str, ...] = ()
    parent_id: UUID | None = None
    root_id: UUID | None = None
    schedule_id: UUID | None = None
    created_at: datetime
    due_at: datetime | None = None
    expires_at: datetime | None = None
    queued_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    updated_at: datetime | None = None
    trace_id: str | None = None
    cancel_requested_at: datetime | None = None
    """When somebody asked for its end; whether it came to that, the state says."""
    cancel_reason: str | None = None
    retry_of: UUID | None = None
    """The task that this one is another try of."""
    retried_as: UUID | None = None
    """The next try of this one."""

    @property
    def finished(self) -> bool:
        """Whether the state is one that no task leaves."""
        return self.state.terminal

    @property
    def succeeded(self) -> bool:
        return self.state is TaskState.SUCCEEDED


class TaskPage(Result):
    items: tuple[Task, ...]
    next_cursor: str | None = None


class Cancelling(Result):
    """What became of a cancellation."""

    outcome: str
    """`cancelled`, `already_finished` (it had ended before), `requested` (its service is told, and will say how it
    ended) or `too_late` (it ended otherwise before the cancellation reached it)."""
    detail: str = ""
    """What has happened and what will, in one sentence."""
    task: Task

    @property
    def settled(self) -> bool:
        """Whether the task has ended, in whatever way."""
        return self.task.finished


class Explanation(Result):
    """Why a task is not done."""

    task_id: UUID
    state: TaskState
    reason: str
    """For programs: `queued`, `no_consumers`, `retry_due` ...; docs/http-api.md lists them."""
    summary: str = ""
    """For people."""
    advice: str = ""
    next_at: datetime | None = None
    """When something is to happen next, where that is known."""
    facts: dict[str, Any] = Field(default_factory=dict)
    observed_at: datetime


class StateChange(Result):
    """One step in the life of one task."""

    seq: int
    """Rises within a stream; the place to resume it from."""
    task_id: UUID
    state: TaskState
    attempt: int = 0
    at: datetime
    detail: Any = None


class TaskType(Result):
    """A task type that a service has announced."""

    type: str
    service: str
    kind: TaskKind = TaskKind.COMMAND
    version: int = 1
    title: str = ""
    description: str = ""
    payload_schema: dict[str, Any] = Field(default_factory=dict)
    """JSON Schema 2020-12 of the payload."""
    max_attempts: int | None = None
    """None means without limit."""
    queue: str | None = None
    announced_at: datetime | None = None


class TaskTypes(Result):
    items: tuple[TaskType, ...]


class ServiceQueue(Result):
    """One queue of a service, as it was last seen."""

    queue: str
    ready: int
    unacknowledged: int
    consumers: int
    observed_at: datetime


class Service(Result):
    """A worker service that has announced itself."""

    service: str
    release: str = ""
    announced_at: datetime
    types: int = 0
    paused_at: datetime | None = None
    """None while its workers take tasks."""
    pause_reason: str | None = None
    queues: tuple[ServiceQueue, ...] = ()


class Services(Result):
    items: tuple[Service, ...]


class Schedule(Result):
    """A task that is submitted again and again."""

    id: UUID
    name: str
    type: str
    payload: Any = None
    tags: tuple[str, ...] = ()
    priority: int | None = None
    cron: str | None = None
    """Five fields, read in `timezone`; None for a schedule with an interval."""
    interval_seconds: float | None = None
    timezone: str = "UTC"
    misfire: str = "once"
    misfire_window_seconds: float = 3600.0
    overlap: str = "allow"
    starts_at: datetime | None = None
    ends_at: datetime | None = None
    paused: bool = False
    owner: str | None = None
    """The service that announced it; None for one made over HTTP."""
    next_fire_at: datetime | None = None
    """None while paused, and when no fire is left."""
    next_fires: tuple[datetime, ...] = ()
    """Some more, to check a cron line by."""
    last_fire_at: datetime | None = None
    last_task_id: UUID | None = None
    last_error: str | None = None
    """Why the last try to fire came to nothing; None while all is well."""

    @property
    def rhythm(self) -> str:
        """When it fires, in one line."""
        return f"{self.cron} ({self.timezone})" if self.cron else f"every {self.interval_seconds:g} s"


class SchedulePage(Result):
    items: tuple[Schedule, ...]
    next_cursor: str | None = None
