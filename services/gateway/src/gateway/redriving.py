"""Sending a task's message again because the one before is nowhere: the same id, the same attempt.

The inbox makes that safe: should the lost message turn up after all, the attempt still runs once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.models import tasks, unaccounted_tasks
from gateway.sightings import Seen
from gateway.unaccounted import Record
from taskmesh import celery_protocol, traces
from taskmesh.celery_protocol import REPLACEMENT_STRIDE, TaskMessage
from taskmesh.contracts.lifecycle import TERMINAL, TaskKind
from taskmesh.outbox import OutboxMessage, insert_messages, outbox

AT_ONCE: Final = 100
"""Tasks of one audit. Whoever has purged a queue of a million gets them back at a bearable rate."""

FIRST_PAUSE: Final = timedelta(minutes=1)
LONGEST_PAUSE: Final = timedelta(hours=1)


def is_due(record: Record, now: datetime) -> bool:
    """True if a task may be sent again: at once the first time, and then after 1, 2, 4 ... minutes, at most an hour."""
    if record.redriven_at is None:
        return True
    doublings = min(max(record.redrives - 1, 0), 10)
    return now - record.redriven_at >= min(FIRST_PAUSE * (1 << doublings), LONGEST_PAUSE)


async def redrive(connection: AsyncConnection, seen: Mapping[UUID, Seen], *, at: datetime) -> list[UUID]:
    """Put the messages of tasks that have not ended into the outbox again, and return the tasks' ids.

    A task whose payload the gateway does not know is left alone; so is one whose message is in the outbox.

    Args:
        seen: What its service last said of each task.
    """
    lost = (
        select(tasks)
        .where(
            tasks.c.id == func.any(sorted(seen)),
            tasks.c.state.not_in([state.value for state in TERMINAL]),
            tasks.c.payload.is_not(None),
            ~select(outbox.c.id).where(outbox.c.task_id == tasks.c.id).exists(),
        )
        .order_by(tasks.c.id)
        .with_for_update(skip_locked=True, key_share=True)
    )
    rows: Sequence[Row[Any]] = (await connection.execute(lost)).all()
    messages = {row.id: message for row in rows if (message := _message(row, seen[row.id], at)) is not None}
    if messages:
        await connection.execute(insert_messages(list(messages.values())))
        await connection.execute(
            update(unaccounted_tasks)
            .where(unaccounted_tasks.c.task_id == func.any(sorted(messages)))
            .values(redriven_at=at, redrives=unaccounted_tasks.c.redrives + 1)
        )
    return list(messages)


def _message(task: Row[Any], seen: Seen, now: datetime) -> OutboxMessage | None:
    # The inbox holds the place of the attempt that is over, or that was begun and is not: the next one is wanted.
    place = max(task.sequence, 0) if seen.sequence is None else seen.sequence + 1
    if place >= REPLACEMENT_STRIDE:
        # The task has replaced itself by another payload, which never came here.
        return None
    message = TaskMessage(
        type=task.type,
        id=task.id,
        payload=task.payload,
        kind=TaskKind(task.kind),
        root_id=task.root_id,
        parent_id=task.parent_id,
        retries=place,
        expires_at=task.expires_at,
        priority=task.priority,
        traceparent=traces.traceparent(task.trace_id, task.span_id),
        version=task.version,
    )
    due_at = task.due_at if task.due_at is not None and task.due_at.astimezone(UTC) > now else None
    if message.kind is TaskKind.EVENT:
        event_id = task.event_id or task.id
        return celery_protocol.listening(message, service=task.service, event_id=event_id, due_at=due_at)
    return celery_protocol.command(message, due_at=due_at)
