"""The inbox: which tasks this service has dealt with, so that an effect happens once however often a message comes.

One row for each task, written in the transaction of the effect. Concurrent deliveries of one task wait for each other
at the row's lock; the second then finds the task finished, or its attempt superseded.
"""

from __future__ import annotations

from enum import StrEnum
from uuid import UUID

from sqlalchemy import Boolean, Column, DateTime, Integer, Table, Text, Uuid, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningInsert

from taskmesh.outbox import metadata


class InboxState(StrEnum):
    WAITING = "waiting"
    """Not finished. With `started_at` an attempt was begun and has not been settled: it runs, or it was lost. Without,
    the attempt `sequence` is over and another one is under way through the outbox (a retry, or an `eta`)."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


inbox = Table(
    "inbox",
    metadata,
    Column("task_id", Uuid, primary_key=True),
    Column("sequence", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    # How often the task was started since it was sent or replaced: attempts that ended, and those that were lost.
    Column("starts", Integer, nullable=False, server_default="0"),
    Column("started_at", DateTime(timezone=True)),
    # `host:pid` of the last start.
    Column("worker", Text),
)

cancellations = Table(
    "cancellations",
    metadata,
    Column("task_id", Uuid, primary_key=True),
    Column("requested_at", DateTime(timezone=True), nullable=False),
    Column("force", Boolean, nullable=False, server_default="false"),
    Column("reason", Text),
    Column("received_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)
"""Tasks that somebody wants cancelled; kept, so that a delivery that comes later is not run."""

pauses = Table(
    "pauses",
    metadata,
    Column("one", Boolean, primary_key=True, server_default="true"),
    Column("paused_at", DateTime(timezone=True)),
    Column("changed_at", DateTime(timezone=True), nullable=False),
)
"""One row at most: whether the service's workers are paused, and since when."""


def claim(session: Session, task_id: UUID, sequence: int, state: InboxState) -> bool:
    """Write what becomes of an attempt; False if the task is finished or a later attempt is under way.

    Holds the task's row until the caller commits, so a second delivery of the same attempt waits here.
    """
    return session.execute(_claim(task_id, sequence, state)).one_or_none() is not None


def _claim(task_id: UUID, sequence: int, state: InboxState) -> ReturningInsert[tuple[UUID]]:
    statement = insert(inbox).values(task_id=task_id, sequence=sequence, state=state.value)
    return statement.on_conflict_do_update(
        index_elements=[inbox.c.task_id],
        set_={"sequence": sequence, "state": state.value, "updated_at": func.now()},
        where=(inbox.c.state == InboxState.WAITING.value) & (inbox.c.sequence < sequence),
    ).returning(inbox.c.task_id)


def is_open(session: Session, task_id: UUID, sequence: int) -> bool:
    """True unless the attempt is finished or superseded; takes no lock."""
    row = session.execute(select(inbox.c.state, inbox.c.sequence).where(inbox.c.task_id == task_id)).one_or_none()
    return row is None or (row.state == InboxState.WAITING.value and row.sequence < sequence)
