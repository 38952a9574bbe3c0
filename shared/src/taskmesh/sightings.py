"""What a service answers when the gateway asks what it knows of some tasks: what its inbox and its outbox hold.

The answer leaves through the outbox, behind the lifecycle events that were written before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import BigInteger, RowMapping, Uuid, bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from taskmesh import exchanges
from taskmesh.contracts.control import Inquiry, Sighting, Sightings
from taskmesh.inbox import InboxState, lock_key
from taskmesh.lifecycle import PROPERTIES
from taskmesh.outbox import OutboxMessage

ROUTING_KEY: Final = "task.sighted."
"""How the routing key of an answer begins; the service's name ends it."""

WORTHLESS_AFTER: Final = timedelta(minutes=5)
"""An answer that could not leave for so long is dropped: the gateway has asked again since."""


async def answer(connection: AsyncConnection, inquiry: Inquiry, service: str) -> OutboxMessage:
    """Return the message that tells what the service knows of the tasks; the caller puts it into the outbox.

    Takes the locks of running tasks for an instant, and leaves none behind.
    """
    ids = list(dict.fromkeys(inquiry.task_ids))
    rows = {row["task_id"]: row for row in (await connection.execute(_KNOWN, {"ids": ids})).mappings()}
    begun = [task_id for task_id, row in rows.items() if _is_begun(row)]
    lost = await _without_worker(connection, begun)
    now = datetime.now(UTC)
    items = tuple(_sighting(task_id, rows.get(task_id), is_lost=task_id in lost) for task_id in ids)
    answered = Sightings(inquiry_id=inquiry.inquiry_id, service=service, at=now, items=items)
    return OutboxMessage(
        exchange=exchanges.LIFECYCLE,
        routing_key=ROUTING_KEY + service,
        body=answered.model_dump_json(exclude_none=True).encode(),
        properties=PROPERTIES,
        # Of no use to anyone while there is no gateway.
        mandatory=False,
        expires_at=now + WORTHLESS_AFTER,
    )


_KNOWN = text(
    """
    select task_id, inbox.state, inbox.sequence, inbox.starts, inbox.started_at, inbox.worker, waiting.due_at
    from unnest(cast(:ids as uuid[])) as asked(task_id)
    left join inbox using (task_id)
    left join lateral (select min(due_at) as due_at from outbox where outbox.task_id = asked.task_id) as waiting on true
    where inbox.state is not null or waiting.due_at is not null
    """
).columns(task_id=Uuid)

# Whoever runs a task holds its row's lock, or its advisory lock. SHARE, because KEY SHARE would get past the writer.
_FREE_ROWS = text(
    """
    select task_id from inbox
    where task_id = any(cast(:ids as uuid[])) and state = 'waiting' and started_at is not null
    for share skip locked
    """
).columns(task_id=Uuid)

_FREE_KEYS = text("select key from unnest(:keys) as key where pg_try_advisory_xact_lock(key)").bindparams(
    bindparam("keys", type_=ARRAY(BigInteger))
)


def _is_begun(row: RowMapping) -> bool:
    return row["state"] == InboxState.WAITING and row["started_at"] is not None


async def _without_worker(connection: AsyncConnection, task_ids: Iterable[UUID]) -> set[UUID]:
    """Those of the tasks that were begun and whose locks nobody holds: their worker is gone."""
    asked = list(task_ids)
    if not asked:
        return set()
    # Rolled back, so that the locks are free again before the caller commits.
    probe = await connection.begin_nested()
    try:
        free = list((await connection.execute(_FREE_ROWS, {"ids": asked})).scalars())
        keys = {lock_key(task_id): task_id for task_id in free}
        unlocked = (await connection.execute(_FREE_KEYS, {"keys": list(keys)})).scalars() if keys else ()
        return {keys[key] for key in unlocked}
    finally:
        await probe.rollback()


def _sighting(task_id: UUID, row: RowMapping | None, *, is_lost: bool) -> Sighting:
    if row is None:
        return Sighting(task_id=task_id, state="unknown")
    known: dict[str, Any] = {"task_id": task_id, "due_at": row["due_at"]}
    if row["state"] is None:
        return Sighting(state="outbox", **known)
    known |= {name: row[name] for name in ("sequence", "starts", "started_at", "worker")}
    if row["state"] != InboxState.WAITING:
        return Sighting(state=row["state"], **known)
    if _is_begun(row) and not (is_lost and row["due_at"]):
        return Sighting(state="running", alive=not is_lost, **known)
    return Sighting(state="outbox" if row["due_at"] else "waiting", **known)
