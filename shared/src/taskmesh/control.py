"""Control messages: what the gateway tells a service past its queues of work, and what the service makes of it.

The service's relay takes them as they come (`ControlConsumer`), and a worker takes what waits before its first task
(`taskmesh.worker.control`). Both call `apply`.

A cancellation takes two commits. The first one writes down that the task is unwanted: from then on no attempt begins,
because every attempt looks there when it begins, and when it asks for another one. The second one ends what does not
run. So a task that is missed by the second, because an attempt holds its row, has seen the first or will.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pydantic import SecretStr, ValidationError
from sqlalchemy import delete, exists, func, literal, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from taskmesh import exchanges, lifecycle, logs, sightings
from taskmesh.consuming import BatchConsumer, Delivery
from taskmesh.contracts.control import CONTROL, Cancellation, Inquiry, Pause
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskState
from taskmesh.inbox import InboxState, cancellations, inbox, pauses
from taskmesh.outbox import OutboxMessage, insert_messages, outbox

logger = logging.getLogger(__name__)

Message = Cancellation | Pause | Inquiry

LOCK_TIMEOUT = text("set local lock_timeout = '2s'")
"""What holds a row for longer is not waited for: the message comes again, and others are behind it."""


# A message that cannot be dealt with for a reason of its own is parked; an outage of the database is no such reason.
POISON_AFTER = 20
BATCH_SIZE = 100


class Outcome(StrEnum):
    """What a cancellation has found."""

    CANCELLED = "cancelled"
    """Nothing ran: the task has ended."""
    LEFT = "left"
    """An attempt runs or was lost, or the task had ended: whoever settles it sees the cancellation."""


def queue_of(service: str) -> str:
    """The queue of a service's control messages, and their routing key."""
    return f"{service}.control"


def outgoing(service: str, message: Message, *, expires_at: datetime | None = None) -> OutboxMessage:
    """The outbox form of a control message; kept until the service has a queue for it, or until it expires."""
    traceparent = message.traceparent if isinstance(message, Cancellation) else None
    return OutboxMessage(
        exchange=exchanges.DIRECT,
        routing_key=queue_of(service),
        body=CONTROL.dump_json(message, exclude_none=True),
        headers={"traceparent": traceparent} if traceparent else {},
        properties={"content_type": "application/json", "content_encoding": "utf-8", "delivery_mode": 2},
        expires_at=expires_at,
    )


def decode(body: bytes) -> Message:
    """Read the body of a control message.

    Raises:
        pydantic.ValidationError: It is none.
    """
    return CONTROL.validate_json(body)


def faults(error: ValidationError) -> str:
    """What is wrong with a control message and where, without its values."""
    places = [f"/{'/'.join(str(part) for part in item['loc'])}: {item['type']}" for item in error.errors()[:5]]
    return f"no control message: {'; '.join(places)}"


async def apply(engine: AsyncEngine, messages: Sequence[Message], service: str) -> None:
    """Do what the messages say and commit it; repeating it changes nothing.

    Args:
        engine: Of the service's database.
        messages: In the order of their arrival.
        service: Whose they are.
    """
    # In one order everywhere, so that two batches with the same tasks cannot wait for each other in a circle.
    unwanted = sorted((m for m in messages if isinstance(m, Cancellation)), key=lambda message: message.task_id)
    if unwanted:
        async with engine.begin() as connection:
            await note(connection, unwanted)
    async with engine.begin() as connection:
        await connection.execute(LOCK_TIMEOUT)
        for cancellation in unwanted:
            outcome = await settle(connection, cancellation, service)
            logger.info("cancellation received", extra={**_task_of(cancellation), "outcome": outcome})
        for message in messages:
            match message:
                case Pause():
                    await pause(connection, message)
                    logger.info("pause received", extra={"paused": message.paused})
                case Inquiry():
                    answer = await sightings.answer(connection, message, service)
                    await connection.execute(insert_messages([answer]))


def _task_of(cancellation: Cancellation) -> dict[str, Any]:
    known = cancellation
    return logs.of_task(known.task_id, known.type, known.attempt, trace_id=known.trace_id)


async def note(connection: AsyncConnection, unwanted: Sequence[Cancellation]) -> None:
    """Write down that nobody wants these tasks any more; asked twice, force and the first reason count."""
    statement = insert(cancellations)
    await connection.execute(
        statement.on_conflict_do_update(
            index_elements=[cancellations.c.task_id],
            set_={"force": True},
            where=statement.excluded.force & ~cancellations.c.force,
        ),
        [
            {
                "task_id": cancellation.task_id,
                "requested_at": cancellation.requested_at,
                "force": cancellation.force,
                "reason": cancellation.reason,
            }
            for cancellation in unwanted
        ],
    )


async def settle(connection: AsyncConnection, cancellation: Cancellation, service: str) -> Outcome:
    """End the task if nothing of it runs: its place in the inbox, its messages in the outbox, and word to the ledger.

    Waits for no attempt: a row that is locked belongs to one that runs.
    """
    columns = (inbox.c.state, inbox.c.sequence, inbox.c.starts, inbox.c.started_at)
    statement = select(*columns).where(inbox.c.task_id == cancellation.task_id)
    row = (await connection.execute(statement.with_for_update(skip_locked=True))).one_or_none()
    if row is None:
        sequence, starts = 0, 0
        if not await _insert_cancelled(connection, cancellation):
            return Outcome.LEFT
    elif row.state == InboxState.WAITING and row.started_at is None:
        sequence, starts = row.sequence, row.starts
        await connection.execute(
            update(inbox)
            .where(inbox.c.task_id == cancellation.task_id)
            .values(state=InboxState.CANCELLED.value, updated_at=func.now())
        )
    else:
        return Outcome.LEFT
    # A message that the relay is publishing is delivered, and then skipped.
    unsent = select(outbox.c.id).where(outbox.c.task_id == cancellation.task_id).with_for_update(skip_locked=True)
    await connection.execute(delete(outbox).where(outbox.c.id.in_(unsent)))
    event = _cancelled(cancellation, service, sequence=sequence, starts=starts)
    await connection.execute(insert_messages([lifecycle.message(event)]))
    return Outcome.CANCELLED


async def _insert_cancelled(connection: AsyncConnection, cancellation: Cancellation) -> bool:
    """Settle a task that the service has never seen; False if it has seen it meanwhile, or an attempt runs."""
    # Asked first, because `on conflict do nothing` would wait for an attempt that holds the row.
    unseen = ~exists().where(inbox.c.task_id == cancellation.task_id)
    row = select(literal(cancellation.task_id), literal(0), literal(InboxState.CANCELLED.value)).where(unseen)
    statement = insert(inbox).from_select(["task_id", "sequence", "state"], row).on_conflict_do_nothing()
    return (await connection.execute(statement.returning(inbox.c.task_id))).one_or_none() is not None


def _cancelled(cancellation: Cancellation, service: str, *, sequence: int, starts: int) -> LifecycleEvent:
    """The ledger takes it whatever the sequence: the next attempt may have been announced already."""
    return LifecycleEvent(
        task_id=cancellation.task_id,
        type=cancellation.type,
        state=TaskState.CANCELLED,
        at=datetime.now(UTC),
        service=service,
        kind=cancellation.task_kind,
        sequence=sequence,
        attempt=starts,
        root_id=cancellation.root_id,
        parent_id=cancellation.parent_id,
        event_id=cancellation.event_id,
        traceparent=cancellation.traceparent,
    )


async def pause(connection: AsyncConnection, message: Pause) -> None:
    """Pause the service's workers or let them go on, unless a newer message has been heard."""
    statement = insert(pauses).values(one=True, paused_at=message.at if message.paused else None, changed_at=message.at)
    excluded = statement.excluded
    await connection.execute(
        statement.on_conflict_do_update(
            index_elements=[pauses.c.one],
            set_={
                # Paused again: since the first time.
                "paused_at": func.coalesce(pauses.c.paused_at, excluded.paused_at) if message.paused else None,
                "changed_at": excluded.changed_at,
            },
            where=pauses.c.changed_at < excluded.changed_at,
        )
    )


class ControlConsumer:
    """Takes a service's control messages for as long as its relay runs.

    Args:
        engine: Of the service's database; uses one connection.
    """

    def __init__(self, engine: AsyncEngine, amqp_url: SecretStr | str, service: str) -> None:
        self._engine = engine
        self._service = service
        self._consumer = BatchConsumer(
            amqp_url,
            [queue_of(service)],
            self._handle,
            name=f"{service}-relay-control",
            batch_size=BATCH_SIZE,
            poison_after=POISON_AFTER,
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Take control messages until `stop` is set, through outages of broker and database."""
        await self._consumer.run(stop)

    async def _handle(self, batch: Sequence[Delivery]) -> None:
        messages: list[Message] = []
        for delivery in batch:
            try:
                messages.append(decode(delivery.body))
            except ValidationError as error:
                delivery.reject(faults(error))
        if messages:
            await apply(self._engine, messages, self._service)
