"""The inbox: which tasks this service has dealt with, so that an effect happens once however often a message comes.

One row for each task. It is written when an attempt starts, so that starts are counted whether or not they end, and
again in the transaction of the effect. Concurrent deliveries of one task wait for each other; the second then finds the
task finished, or its attempt superseded.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    DateTime,
    Exists,
    Integer,
    Table,
    Text,
    Uuid,
    delete,
    func,
    select,
    tuple_,
    update,
)
from sqlalchemy.orm import Session

from taskmesh.outbox import metadata, outbox


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
    # The task has failed, and its message is for the dead letters.
    Column("parked", Boolean, nullable=False, server_default="false"),
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


@dataclass(frozen=True, slots=True)
class Claim:
    """An attempt's hold on its task.

    Attributes:
        is_cancelled: Somebody wanted the task cancelled when it was asked for.
    """

    is_cancelled: bool


# The start is not flushed to disk before the task runs. A worker that dies leaves it behind all the same; only when the
# database dies in the same fraction of a second is a start forgotten, and the task may be tried once more.
_CHECK_IN = """
    with relaxed as (select set_config('synchronous_commit', 'off', true))
    insert into inbox (task_id, sequence, state, starts, started_at, worker)
    select %(task_id)s, %(sequence)s - 1, 'waiting', 1, now(), %(worker)s from relaxed
    on conflict (task_id) do update set
        starts = inbox.starts + %(more)s, started_at = now(), worker = %(worker)s, updated_at = now()
    where inbox.state = 'waiting' and inbox.sequence < %(sequence)s
    returning starts
"""


def check_in(connection: Connection, task_id: UUID, sequence: int, worker: str, *, again: bool = False) -> int | None:
    """Count the start of an attempt; None if the task is finished or a later attempt is under way.

    Who wants to know of cancellations asks afterwards: one that comes after that finds the task started.

    Waits while another delivery of the task is in its last transaction.

    Args:
        connection: In autocommit: the start counts whatever becomes of the attempt.
        task_id: The task.
        sequence: The attempt's place; see `taskmesh.celery_protocol.sequence`.
        worker: `host:pid`.
        again: The attempt has been counted already, and begins anew after an outage of the database.

    Returns:
        How often the task was started, this time included.
    """
    parameters = {"task_id": task_id, "sequence": sequence, "worker": worker, "more": 0 if again else 1}
    starts: int | None = connection.exec_driver_sql(_CHECK_IN, parameters).scalar_one_or_none()
    return starts


def is_parked(connection: Connection, task_id: UUID, sequence: int) -> bool:
    """True if the message of that attempt is for the dead letters, and was not brought there: it has come again."""
    statement = select(inbox.c.parked).where(inbox.c.task_id == task_id, inbox.c.sequence == sequence)
    return bool(connection.execute(statement).scalar_one_or_none())


def is_cancelled(connection: Connection | Session, task_id: UUID) -> bool:
    """True if somebody wants the task cancelled."""
    return connection.execute(select(_cancellation_of(task_id))).scalar_one()


def _cancellation_of(task_id: UUID) -> Exists:
    return select(cancellations.c.task_id).where(cancellations.c.task_id == task_id).exists()


def settle_retry_cancelled(session: Session, task_id: UUID) -> bool:
    """End a task whose next attempt waits, and take that out of the outbox; False if no attempt waits."""
    row = inbox.c.task_id == task_id
    statement = (
        update(inbox)
        .where(row, inbox.c.state == InboxState.WAITING.value, inbox.c.started_at.is_(None))
        .values(state=InboxState.CANCELLED.value, updated_at=func.now())
        .returning(inbox.c.task_id)
    )
    if session.execute(statement).one_or_none() is None:
        return False
    session.execute(delete(outbox).where(outbox.c.task_id == task_id))
    return True


def lock_key(task_id: UUID) -> int:
    """The key of the advisory lock that a task holds while it runs outside its transaction: both halves of its id."""
    high, low = divmod(task_id.int, 1 << 64)
    key = high ^ low
    return key - (1 << 64) if key >= 1 << 63 else key


def wait_alone(session: Session, task_id: UUID) -> None:
    """Wait until no other delivery of the task runs, and keep others waiting until the caller's transaction ends.

    Bound to a transaction and not to the session, so that it works behind a pooler of transactions.
    """
    session.execute(select(func.pg_advisory_xact_lock(lock_key(task_id))))


def take_back_starts(session: Session, starts: Collection[tuple[UUID, str]]) -> None:
    """Do not count these starts: the worker itself has ended them, for the tasks to be run elsewhere.

    Args:
        session: The caller commits.
        starts: Task and `host:pid` of the process, which is gone. Another worker may have the task already; its start
            is not touched.
    """
    session.execute(
        update(inbox)
        .where(
            tuple_(inbox.c.task_id, inbox.c.worker).in_(starts),
            inbox.c.state == InboxState.WAITING.value,
            inbox.c.started_at.is_not(None),
        )
        .values(starts=func.greatest(inbox.c.starts - 1, 0), started_at=None)
    )


_CLAIM = """
    insert into inbox (task_id, sequence, state) values (%(task_id)s, %(sequence)s, %(state)s)
    on conflict (task_id) do update set
        sequence = %(sequence)s, state = %(state)s, started_at = null, updated_at = now()
    where inbox.state = 'waiting' and inbox.sequence < %(sequence)s
    returning exists (select from cancellations where cancellations.task_id = inbox.task_id)
"""


def claim(connection: Connection, task_id: UUID, sequence: int, state: InboxState) -> Claim | None:
    """Write what becomes of an attempt; None if the task is finished or a later attempt is under way.

    Holds the task's row until the caller commits, so a second delivery of the same attempt waits here.
    """
    parameters = {"task_id": task_id, "sequence": sequence, "state": state.value}
    row = connection.exec_driver_sql(_CLAIM, parameters).one_or_none()
    return None if row is None else Claim(row[0])
