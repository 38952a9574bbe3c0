"""Ending a task that nobody wants any more, wherever it is.

A task that has not left the gateway ends here and now, with its message. Any other is its service's: the service is
told by a control message, which overtakes the backlog and needs no worker, and says itself how the task ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import Row, delete, func, literal, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway import ledger
from gateway.models import tasks, unaccounted_tasks
from taskmesh import control
from taskmesh.contracts.control import Cancellation
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskState
from taskmesh.errors import ConflictError
from taskmesh.outbox import insert_messages, outbox

NO_ROUTE = "312 "
"""How the relay notes that a message came back because no queue took it: there is no copy of it."""


class CancelOutcome(StrEnum):
    """What became of a cancellation."""

    CANCELLED = "cancelled"
    ALREADY_FINISHED = "already_finished"
    """The task had ended before it was asked for."""
    REQUESTED = "requested"
    """Its service has the word, or will have."""
    TOO_LATE = "too_late"
    """The task ended otherwise before the cancellation reached it."""


class ForceNotAllowed(ConflictError):
    """The type does not announce that a running task of it may be killed."""

    code = "force_not_allowed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Who wants a task cancelled, and how.

    Attributes:
        by: The API key.
        force: Kill the process that runs it.
    """

    by: UUID | None = None
    reason: str | None = None
    force: bool = False


async def cancel(
    connection: AsyncConnection,
    task_id: UUID,
    wish: Wish,
    *,
    force_allowed: bool = False,
    traceparent: str | None = None,
) -> tuple[CancelOutcome, Row[Any]]:
    """Cancel a task, or see to it that its service does; asked again, it changes nothing but that force may be added.

    Returns:
        `cancelled`, `already_finished` or `requested`, and the task as it is then.

    Raises:
        NotFound: The ledger does not know it.
        ForceNotAllowed: Force is wanted and not allowed; nothing was asked for then.
    """
    task = await ledger.get_task(connection, task_id)
    await ledger.lock(connection, [task_id, task.root_id])
    task = await ledger.get_task(connection, task_id)
    if TaskState(task.state).terminal:
        return CancelOutcome.ALREADY_FINISHED, task
    if wish.force and not force_allowed:
        raise ForceNotAllowed(f"running tasks of type {task.type} may not be killed; cancel without force")
    await _note(connection, task_id, wish)
    if await _withdraw(connection, task):
        await ledger.advance(connection, [_cancelled(task)])
        return CancelOutcome.CANCELLED, await ledger.get_task(connection, task_id)
    if task.cancel_requested_at is None or (wish.force and not task.cancel_forced):
        message = _cancellation(task, wish, traceparent)
        await connection.execute(insert_messages([control.outgoing(task.service, message)]))
    return CancelOutcome.REQUESTED, await ledger.get_task(connection, task_id)


async def _note(connection: AsyncConnection, task_id: UUID, wish: Wish) -> None:
    """Keep who was first to ask, and why; force counts whoever adds it."""
    await connection.execute(
        update(tasks)
        .where(tasks.c.id == task_id)
        .values(
            cancel_requested_at=func.coalesce(tasks.c.cancel_requested_at, func.now()),
            cancel_requested_by=func.coalesce(tasks.c.cancel_requested_by, wish.by),
            cancel_reason=func.coalesce(tasks.c.cancel_reason, wish.reason),
            cancel_forced=func.coalesce(tasks.c.cancel_forced, literal(value=False)) | wish.force,
        )
    )


async def _withdraw(connection: AsyncConnection, task: Row[Any]) -> bool:
    """Take the task's message back from the outbox; True if it is certain that no copy of it has ever left.

    A message that the relay is publishing at this moment is left to it.
    """
    statement = select(func.count()).select_from(outbox).where(outbox.c.task_id == task.id)
    count = (await connection.execute(statement)).scalar_one()
    taken = (await connection.execute(_TAKE_MESSAGES, {"task_id": task.id})).all()
    if not taken:
        return False
    await connection.execute(delete(outbox).where(outbox.c.id.in_([message.id for message in taken])))
    begun = task.attempt > 0 or task.started_at is not None
    certain = not begun and len(taken) == count and all(_has_stayed(message) for message in taken)
    return certain and not await _was_sent_again(connection, task.id)


def _has_stayed(message: Row[Any]) -> bool:
    """True if no relay can have published the message: not even one that was killed before it could delete the row.

    Relays claim what is due by locking it, and PostgreSQL keeps the number of the last transaction that locked a row,
    until it crashes. A claim that ended by a note of the broker's refusal has left the note.
    """
    if message.failures:
        return bool((message.last_error or "").startswith(NO_ROUTE)) and not message.was_claimed
    return message.waits or (message.outlived_no_crash and not message.was_claimed)


_TAKE_MESSAGES = text(
    """
    select id, failures, last_error, due_at > clock_timestamp() as waits,
           -- The transaction that put it back had claimed it, and knows what became of it.
           xmax <> '0'::xid and xmax <> xmin as was_claimed,
           created_at > pg_postmaster_start_time() as outlived_no_crash
    from outbox where task_id = :task_id
    for update skip locked
    """
)
"""PostgreSQL reads a row and then locks it, which puts our own number there; nobody claims and publishes in between."""


async def _was_sent_again(connection: AsyncConnection, task_id: UUID) -> bool:
    """True for a task whose message was missed by an audit, and may turn up."""
    statement = select(unaccounted_tasks.c.redrives).where(unaccounted_tasks.c.task_id == task_id)
    return bool((await connection.execute(statement)).scalar_one_or_none())


def _cancelled(task: Row[Any]) -> LifecycleEvent:
    return LifecycleEvent(
        task_id=task.id,
        type=task.type,
        state=TaskState.CANCELLED,
        at=datetime.now(UTC),
        service=task.service,
        sequence=task.sequence,
        root_id=task.root_id,
        # Nothing has run.
        attempt=0,
    )


def _cancellation(task: Row[Any], wish: Wish, traceparent: str | None) -> Cancellation:
    return Cancellation(
        task_id=task.id,
        type=task.type,
        requested_at=datetime.now(UTC),
        force=wish.force or bool(task.cancel_forced),
        reason=task.cancel_reason or wish.reason,
        task_kind=task.kind,
        root_id=task.root_id,
        parent_id=task.parent_id,
        event_id=task.event_id,
        traceparent=traceparent,
        attempt=task.attempt,
        trace_id=task.trace_id,
    )


def describe(outcome: CancelOutcome, task: Row[Any]) -> str:
    """One sentence: what has happened, and what will."""
    match outcome:
        case CancelOutcome.CANCELLED:
            never = "and never began" if not task.attempt else "and what it had not committed is undone"
            return f"The task has ended, {never}."
        case CancelOutcome.ALREADY_FINISHED:
            return f"The task had ended before, {task.state}; nothing was changed."
        case CancelOutcome.TOO_LATE:
            return f"The task ended before the cancellation reached it, {task.state}."
        case CancelOutcome.REQUESTED:
            return f"{task.service} is told, and will say how it ended; {_prospect(task)}."


def _prospect(task: Row[Any]) -> str:
    if task.state != TaskState.RUNNING:
        return "no worker has to be up for that"
    if task.cancel_forced:
        return "the process that runs it is killed"
    return "it runs, and ends when it next asks whether it is wanted, or else when it is done"
