"""The unit of work of one attempt: {inbox row + effect + outbox rows} in one transaction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from uuid import UUID

import psycopg
from opentelemetry.trace import Span
from psycopg.pq import TransactionStatus
from sqlalchemy import Connection, NestedTransaction, RootTransaction, update
from sqlalchemy.exc import InvalidRequestError, SQLAlchemyError
from sqlalchemy.orm import Session

from taskmesh import inbox, outbox, telemetry
from taskmesh.errors import TaskCancelled
from taskmesh.inbox import InboxState
from taskmesh.outbox import OutboxMessage
from taskmesh.worker.watching import CancelWatch

logger = logging.getLogger(__name__)

CANCEL_SECONDS = 2.0

NOT_BEGUN = "cancelled before its attempt began"

SOUND = frozenset({TransactionStatus.INTRANS, TransactionStatus.INERROR})
"""In these a savepoint can be returned to."""


class AlreadySettled(Exception):
    """Another delivery has settled this attempt, or a later attempt is under way: there is nothing to do."""


class TaskSession(Session):
    """A session that only the runtime commits: a task's own commit would split its effect from its inbox row."""

    may_commit = False

    def commit(self) -> None:
        """Refuse, unless the runtime has finished the unit.

        Raises:
            RuntimeError: Called by a task.
        """
        if not self.may_commit:
            raise RuntimeError(
                "the runtime commits a task's session when the task returns; for an earlier committed step"
                ' declare the task with transaction="last" and use `with self.transaction() as session`'
            )
        super().commit()


@dataclass(frozen=True, slots=True)
class Key:
    """Which attempt of which task."""

    task_id: UUID
    sequence: int


class Unit:
    """Collects the messages of one attempt, and opens its transaction when it is needed.

    Messages stay in memory until the unit is settled: what a failed attempt sent is not sent, and the retry that it
    asked for can be written although its own transaction is broken.
    """

    def __init__(self, key: Key, connect: Callable[[], Connection]) -> None:
        self.key = key
        self.messages: list[OutboxMessage] = []
        self.after_commit: list[Callable[[], None]] = []
        self.watch: CancelWatch | None = None
        self._connect = connect
        self._connection: Connection | None = None
        self._transaction: RootTransaction | None = None
        self._savepoint: str | None = None
        self._session: TaskSession | None = None
        self._is_settled = False
        self._span: Span | None = None

    @property
    def session(self) -> TaskSession:
        """The session of the transaction that will be committed with the inbox row; opened at first use.

        Once the unit is settled, for hooks, one that reads: what it writes is not committed.
        """
        if self._session is None and self._is_settled:
            self._connection = self._connect()
            self._session = TaskSession(self._connection)
        return self._session or self.open()

    def open(self, *, unless_cancelled: bool = False) -> TaskSession:
        """Begin the transaction and claim the attempt in it; a concurrent delivery of the same attempt waits here.

        Raises:
            AlreadySettled: The inbox knows the attempt.
            TaskCancelled: Somebody wants the task cancelled, and `unless_cancelled` is asked for.
        """
        # If it was interrupted before: its own claim would keep it waiting.
        self.drop()
        connection = self._begin(InboxState.SUCCEEDED, unless_cancelled=unless_cancelled)
        # In a savepoint, and a new one after each rollback of the task's own: what it writes can be undone without
        # giving up the claim, and no second delivery gets in between.
        session = TaskSession(connection, join_transaction_mode="create_savepoint")
        session.connection()
        self._savepoint = _name_of(connection.get_nested_transaction())
        self._session = session
        return session

    def _begin(self, state: InboxState, *, unless_cancelled: bool = False) -> Connection:
        connection = self._connection = self._connect()
        self._transaction = connection.begin()
        self._span = telemetry.tracer().start_span("effect transaction")
        claim = inbox.claim(connection, self.key.task_id, self.key.sequence, state)
        if claim is None:
            raise AlreadySettled
        if unless_cancelled and claim.is_cancelled:
            raise TaskCancelled(NOT_BEGUN)
        return connection

    def settle(self, state: InboxState, messages: list[OutboxMessage], *, replaced: bool = False) -> None:
        """Commit the effect, the attempt's place in the inbox, and the messages.

        Args:
            state: What becomes of the attempt.
            messages: What leaves with it.
            replaced: The task goes on as another one under the same id, whose starts are counted anew.

        Raises:
            AlreadySettled: The inbox knows the attempt.
        """
        session = self.session
        session.flush()
        # Refused if a flush has failed and nobody has rolled it back.
        connection = session.connection()
        if not self._goes_on(connection):
            raise InvalidRequestError("the task has ended the transaction that it runs in")
        if state is not InboxState.SUCCEEDED:
            self._record(connection, state, **({"starts": 0} if replaced else {}))
        self._commit(connection, messages)
        for act in self.after_commit:
            try:
                act()
            except Exception:
                # The effect is committed, whatever is made of it.
                logger.exception("hook failed", extra={"hook": "after_commit"})

    def settle_without_effect(self, state: InboxState, messages: list[OutboxMessage], *, parked: bool = False) -> None:
        """Undo what the task wrote, then commit the attempt's place in the inbox and the messages.

        Args:
            state: What becomes of the attempt.
            messages: What leaves with it.
            parked: Its own message is for the dead letters.

        Raises:
            AlreadySettled: The inbox knows the attempt; possible only when its transaction was lost.
        """
        self._undo()
        connection = self._connection or self._begin(state)
        self._record(connection, state, **({"parked": True} if parked else {}))
        self._commit(connection, messages)

    def _commit(self, connection: Connection, messages: list[OutboxMessage]) -> None:
        outbox.put(connection, messages)
        self.commit(connection)
        self._end_span("committed", len(messages))
        self._is_settled = True
        self._close()

    def commit(self, connection: Connection) -> None:
        """The one commit of a unit, with its savepoints, which need no statement of their own to be kept."""
        connection.commit()

    def _end_span(self, outcome: str, messages: int) -> None:
        span, self._span = self._span, None
        if span is not None:
            span.set_attribute("taskmesh.transaction.outcome", outcome)
            span.set_attribute("taskmesh.transaction.messages", messages)
            span.end()

    def _record(self, connection: Connection, state: InboxState, **values: int) -> None:
        mine = inbox.inbox.c.task_id == self.key.task_id
        connection.execute(update(inbox.inbox).where(mine).values(state=state.value, **values))

    def _undo(self) -> None:
        """Back to the claim if the transaction is sound; else drop it, and the claim with it."""
        connection = self._connection
        if self._session is not None and connection is not None and self._is_sound(connection):
            self._session.expunge_all()
            try:
                # By its name: PostgreSQL keeps it, whatever the session or the task has made of the savepoints in it.
                connection.connection.cursor().execute(f"rollback to savepoint {self._savepoint}")
            except (SQLAlchemyError, psycopg.Error):
                # The connection was lost, or the task has removed the savepoint: then all of it goes.
                pass
            else:
                return
        self.drop()

    def _goes_on(self, connection: Connection) -> bool:
        """True if the transaction that began with the claim has not ended; a task may have ended it."""
        return connection.get_transaction() is self._transaction

    def _is_sound(self, connection: Connection) -> bool:
        return self._goes_on(connection) and _status(connection) in SOUND

    def drop(self) -> None:
        """Give up the transaction, whatever state it is in."""
        self._end_span("rolled back", 0)
        self._close()

    def _close(self) -> None:
        connection, session = self._connection, self._session
        self._connection = self._transaction = self._savepoint = self._session = None
        if connection is not None:
            if _status(connection) is TransactionStatus.ACTIVE:
                abandon(connection)
            connection.close()
        if session is not None:
            # Its connection is closed: nothing is sent any more.
            session.close()


def _name_of(savepoint: NestedTransaction | None) -> str:
    assert savepoint is not None
    return savepoint._savepoint  # noqa: SLF001 - SQLAlchemy tells it nowhere else


def give_up(session: Session) -> None:
    """Roll back and close, even in the middle of a query."""
    connection = None
    # One whose flush has failed has no connection for anybody, and runs no query.
    with suppress(SQLAlchemyError):
        connection = session.connection() if session.in_transaction() else None
    if connection is not None and _status(connection) is TransactionStatus.ACTIVE:
        # The connection first: closing the session alone would still send a ROLLBACK.
        abandon(connection)
    session.close()


def abandon(connection: Connection) -> None:
    """Cancel the connection's query, if one still runs, and let it never be used again.

    A soft time limit raises inside psycopg's wait: the query still runs, and a ROLLBACK would be refused with "another
    command is already in progress" while the orphan keeps its locks.
    """
    driver_connection = connection.connection.driver_connection
    if driver_connection is not None:
        with suppress(psycopg.Error):
            driver_connection.cancel_safe(timeout=CANCEL_SECONDS)
    connection.invalidate()


def _status(connection: Connection) -> TransactionStatus | None:
    """What the connection is in the middle of; None when it is lost."""
    try:
        driver_connection = connection.connection.driver_connection
    except SQLAlchemyError:
        return None
    return None if driver_connection is None else TransactionStatus(driver_connection.info.transaction_status)


_current: ContextVar[Unit | None] = ContextVar("taskmesh_unit", default=None)


def current() -> Unit | None:
    """The unit of the attempt that runs here, or None outside any."""
    return _current.get()


@contextmanager
def running(unit: Unit) -> Iterator[Unit]:
    """Make the unit current for the block, and give up its transaction if the block leaves it open."""
    token = _current.set(unit)
    try:
        yield unit
    finally:
        _current.reset(token)
        unit.drop()
