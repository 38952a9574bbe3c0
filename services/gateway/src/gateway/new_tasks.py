"""A task as it begins: its first row in the ledger, and the message that its worker will receive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from gateway.identifiers import uuid7
from taskmesh import celery_protocol, logs
from taskmesh.celery_protocol import TaskMessage
from taskmesh.contracts.lifecycle import TaskKind, TaskState
from taskmesh.outbox import OutboxMessage
from taskmesh.traces import Creation


@dataclass(slots=True, kw_only=True)
class NewTask:
    """A task that somebody has asked for, with its id and its time of birth.

    Attributes:
        due_at: Not published before; None means at once.
        creation: The trace context that its message is created under.
        root_id: None makes it its own root.
        event_id: The event that it handles, if it is a listener's task.
        retry_of: The task that this one is another try of.
    """

    type: str
    service: str
    payload: Mapping[str, Any]
    version: int = 1
    id: UUID = field(default_factory=uuid7)
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    due_at: datetime | None = None
    expires_at: datetime | None = None
    priority: int | None = None
    tags: Sequence[str] = ()
    schedule_id: UUID | None = None
    api_key_id: UUID | None = None
    creation: Creation = field(default_factory=Creation)
    kind: TaskKind = TaskKind.COMMAND
    root_id: UUID | None = None
    parent_id: UUID | None = None
    event_id: UUID | None = None
    retry_of: UUID | None = None

    @property
    def state(self) -> TaskState:
        """`scheduled` until the due time, and `queued` from the start when there is none."""
        waits = self.due_at is not None and self.due_at > self.created_at
        return TaskState.SCHEDULED if waits else TaskState.QUEUED

    @property
    def log_facts(self) -> dict[str, Any]:
        """What every log line about it says."""
        return logs.of_task(self.id, self.type, 0, traceparent=self.creation.traceparent)

    def row(self) -> dict[str, Any]:
        """Its first row in the ledger, which is also what the caller is shown."""
        return {
            "id": self.id,
            "type": self.type,
            "kind": self.kind,
            "state": self.state,
            "attempt": 0,
            "service": self.service,
            "version": self.version,
            "payload": self.payload,
            "result": None,
            "error": None,
            "priority": self.priority,
            "tags": list(self.tags),
            "parent_id": self.parent_id,
            "root_id": self.root_id or self.id,
            "event_id": self.event_id,
            "schedule_id": self.schedule_id,
            "api_key_id": self.api_key_id,
            "created_at": self.created_at,
            "due_at": self.due_at,
            "expires_at": self.expires_at,
            "queued_at": self.created_at if self.state is TaskState.QUEUED else None,
            "started_at": None,
            "finished_at": None,
            "updated_at": self.created_at,
            "trace_id": self.creation.trace_id,
            "span_id": self.creation.span_id,
            "cancel_requested_at": None,
            "cancel_reason": None,
            "retry_of": self.retry_of,
            "retried_as": None,
        }

    def message(self) -> OutboxMessage:
        """The message that its worker will receive."""
        message = TaskMessage(
            type=self.type,
            id=self.id,
            payload=self.payload,
            kind=self.kind,
            root_id=self.root_id,
            parent_id=self.parent_id,
            expires_at=self.expires_at,
            priority=self.priority,
            traceparent=self.creation.traceparent,
            trace_links=self.creation.links,
            baggage=self.creation.baggage,
            version=self.version,
        )
        if self.kind is TaskKind.EVENT:
            return celery_protocol.listening(
                message, service=self.service, event_id=self.event_id or self.id, due_at=self.due_at
            )
        return celery_protocol.command(message, due_at=self.due_at)
