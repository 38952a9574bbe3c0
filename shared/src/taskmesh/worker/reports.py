"""What the ledger is told of the messages that a task sends."""

from __future__ import annotations

from datetime import UTC, datetime

from taskmesh import celery_protocol
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskKind, TaskState
from taskmesh.outbox import OutboxMessage


def started(message: OutboxMessage, service: str) -> LifecycleEvent:
    """What the ledger is told of a task or an event on its way out."""
    task = celery_protocol.read(message.headers, ([], {}, None))
    now = datetime.now(UTC)
    later = message.due_at is not None and message.due_at > now
    return LifecycleEvent(
        task_id=task.id,
        type=task.type,
        state=TaskState.SCHEDULED if later else TaskState.QUEUED,
        at=now,
        service=service,
        kind=task.kind,
        event_id=task.id if task.kind is TaskKind.EVENT else None,
        root_id=task.root_id,
        parent_id=task.parent_id,
        traceparent=task.traceparent,
        due_at=message.due_at,
        expires_at=message.expires_at,
    )
