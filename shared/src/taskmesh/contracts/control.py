"""What the gateway tells a service past its queues of work, and what the service answers.

Control messages have a queue of their own, `<service>.control`, so that a cancellation overtakes a backlog. The
service's relay takes them, which runs while its workers are scaled to zero.
"""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import UUID

from pydantic import AwareDatetime, ConfigDict, Field, TypeAdapter

from taskmesh.contracts._base import Part
from taskmesh.contracts.lifecycle import TaskKind


class Cancellation(Part):
    """Somebody wants a task to end without its effect."""

    model_config = ConfigDict(extra="ignore")

    kind: Literal["cancel"] = "cancel"
    task_id: UUID
    type: str
    requested_at: AwareDatetime
    force: bool = False
    """Kill the process that runs it, if its type allows that."""
    reason: Annotated[str, Field(max_length=500)] | None = None
    # What the service needs to report a task that it has never seen.
    task_kind: TaskKind = TaskKind.COMMAND
    root_id: UUID | None = None
    parent_id: UUID | None = None
    event_id: UUID | None = None
    traceparent: str | None = None
    # For the log, as the ledger has them: nothing depends on them.
    attempt: int | None = None
    trace_id: str | None = None


class Pause(Part):
    """The service's workers are to take no more tasks, or to go on; what runs is finished."""

    model_config = ConfigDict(extra="ignore")

    kind: Literal["pause"] = "pause"
    paused: bool
    at: AwareDatetime
    """Orders pauses: an older one does not override a newer one."""


class Inquiry(Part):
    """What does the service know of these tasks?"""

    model_config = ConfigDict(extra="ignore")

    kind: Literal["inquire"] = "inquire"
    inquiry_id: UUID
    task_ids: Annotated[tuple[UUID, ...], Field(max_length=1000)]
    asked_at: AwareDatetime


ControlMessage = Annotated[Cancellation | Pause | Inquiry, Field(discriminator="kind")]

CONTROL: TypeAdapter[Cancellation | Pause | Inquiry] = TypeAdapter(ControlMessage)
"""The body of a control message: one JSON object."""


class Sighting(Part):
    """What a service knows of one task."""

    model_config = ConfigDict(extra="ignore")

    task_id: UUID
    state: Literal["unknown", "outbox", "waiting", "running", "succeeded", "failed", "expired", "cancelled"]
    """`outbox`: a message of it waits there until `due_at`. `waiting`: an attempt is over and another one is on its
    way. `running`: an attempt was started and has not ended; see `alive`. The last four are the inbox's."""
    sequence: int | None = None
    starts: int = 0
    started_at: AwareDatetime | None = None
    worker: str | None = None
    due_at: AwareDatetime | None = None
    alive: bool | None = None
    """Of a running task: False if nobody holds its lock any more, so that its worker is lost."""


class Sightings(Part):
    """The answer to an inquiry; routing key `task.sighted.<service>` on the lifecycle exchange."""

    model_config = ConfigDict(extra="ignore")

    inquiry_id: UUID
    service: str
    at: AwareDatetime
    items: tuple[Sighting, ...]
