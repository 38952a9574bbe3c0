"""The unit of work: effect, claim and messages together, whatever the task makes of its session; then the hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from uuid import uuid4

import psycopg
import pytest
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from taskmesh.database import migrate, sync_engine
from taskmesh.errors import TaskCancelled
from taskmesh.inbox import InboxState
from taskmesh.settings import WorkerSettings
from taskmesh.worker import WorkerApp
from taskmesh.worker.unit import Key, Unit


@pytest.fixture
def engine(database_url: str) -> Iterator:
    migrate(database_url, scripts=None)
    engine = sync_engine(database_url)
    yield engine
    engine.dispose()


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "items"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


TAKEN = 1
"""The number of an item that is there before."""


@pytest.fixture
def items(engine) -> Callable[[], list[int]]:
    """The numbers of what a task has left."""
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(text("insert into items values (:taken)"), {"taken": TAKEN})

    def numbers() -> list[int]:
        with engine.connect() as connection:
            return list(connection.scalars(text("select number from items where number > :n order by 1"), {"n": TAKEN}))

    return numbers


def leave(connection: Session | Connection, number: int) -> None:
    connection.execute(text("insert into items values (:number)"), {"number": number})


def leave_twice_what_is_there(session: Session) -> None:
    """As a loop does that goes on without what cannot be had."""
    for number in (11, 12):
        session.add(Item(number=TAKEN))
        with suppress(IntegrityError):
            session.flush()
        session.rollback()
        leave(session, number)


def swallow_a_failed_flush(session: Session) -> None:
    leave(session, 11)
    session.add(Item(number=TAKEN))
    with suppress(IntegrityError):
        session.flush()


def write_behind_a_failed_flush(session: Session) -> None:
    connection = session.connection()
    swallow_a_failed_flush(session)
    leave(connection, 12)


def fail_after_a_rollback(session: Session) -> None:
    leave(session, 11)
    session.rollback()
    leave(session, 12)
    raise ZeroDivisionError


def fail_in_a_savepoint_after_a_rollback(session: Session) -> None:
    session.rollback()
    leave(session, 11)
    session.begin_nested()
    session.add(Item(number=TAKEN))
    session.flush()


def end_the_transaction(session: Session) -> None:
    session.connection().rollback()
    leave(session, 11)


def close_the_session(session: Session) -> None:
    leave(session, 11)
    session.close()
    leave(session, 12)


def add_what_is_there(session: Session) -> None:
    session.add(Item(number=TAKEN))


@pytest.fixture
def unit(engine) -> Iterator[Unit]:
    unit = Unit(Key(uuid4(), 0), engine.connect)
    unit.open()
    yield unit
    unit.drop()


def committed(engine) -> int:
    with engine.connect() as connection:
        return connection.execute(text("select count(*) from inbox")).scalar_one()


def cancelled(engine) -> Unit:
    """Of a task that somebody wants cancelled."""
    task_id = uuid4()
    with engine.begin() as connection:
        connection.execute(
            text("insert into cancellations (task_id, requested_at) values (:id, now())"), {"id": task_id}
        )
    return Unit(Key(task_id, 0), engine.connect)


def test_it_is_called_once_the_effect_is_committed(engine, unit):
    seen: list[int] = []
    unit.after_commit.append(lambda: seen.append(committed(engine)))

    unit.settle(InboxState.SUCCEEDED, [])

    assert seen == [1]


def test_it_is_not_called_for_an_effect_that_is_undone(unit):
    seen: list[str] = []
    unit.after_commit.append(lambda: seen.append("called"))

    unit.settle_without_effect(InboxState.FAILED, [])

    assert seen == []


def test_what_it_raises_is_logged_and_undoes_nothing(engine, unit, caplog):
    seen: list[str] = []

    def fail() -> None:
        raise RuntimeError("cannot count")

    unit.after_commit += [fail, lambda: seen.append("called")]

    unit.settle(InboxState.SUCCEEDED, [])

    assert (seen, committed(engine)) == (["called"], 1)
    assert [record.message for record in caplog.records] == ["hook failed"]


def test_a_cancellation_that_came_after_the_start_was_counted_is_learnt_from_the_claim(engine):
    unit = cancelled(engine)

    with pytest.raises(TaskCancelled):
        unit.open(unless_cancelled=True)

    unit.drop()
    assert committed(engine) == 0


def test_a_cancellation_does_not_keep_a_task_from_its_last_transaction(engine):
    """In transaction mode "last" it has run by then: too late."""
    unit = cancelled(engine)
    unit.open()

    unit.settle(InboxState.SUCCEEDED, [])

    assert committed(engine) == 1


@pytest.mark.parametrize(
    ("work", "left"),
    [
        (leave_twice_what_is_there, [12]),
        (close_the_session, [12]),
        (swallow_a_failed_flush, None),
        (write_behind_a_failed_flush, None),
        (fail_after_a_rollback, None),
        (fail_in_a_savepoint_after_a_rollback, None),
        (end_the_transaction, None),
        (add_what_is_there, None),
    ],
)
def test_whatever_a_task_does_to_its_session_effect_and_claim_are_committed_together(engine, items, unit, work, left):
    """What it has left, with an inbox row that says so; or, where its work was refused, nothing and its failure."""
    try:
        work(unit.session)
        unit.settle(InboxState.SUCCEEDED, [])
    except (SQLAlchemyError, ZeroDivisionError):
        unit.settle_without_effect(InboxState.FAILED, [])

    with engine.connect() as connection:
        state = connection.scalar(text("select state from inbox"))
    assert (state, items()) == (("succeeded", left) if left else ("failed", []))


def test_a_settled_unit_keeps_no_connection(engine, unit):
    """A hook of its task may take its time."""
    unit.settle(InboxState.SUCCEEDED, [])

    assert engine.pool.checkedout() == 0


def test_a_hook_has_a_session_that_reads(engine, unit):
    unit.settle_without_effect(InboxState.FAILED, [])

    assert unit.session.scalar(text("select state from inbox")) == "failed"
    unit.drop()
    assert engine.pool.checkedout() == 0


def test_a_task_that_was_interrupted_while_its_transaction_began_does_not_wait_for_itself(engine, unit, monkeypatch):
    """In transaction mode "last" it may ask for its session again in the block that handles its time limit."""
    unit.drop()

    def interrupted(*_: object) -> None:
        monkeypatch.undo()
        raise TimeoutError

    monkeypatch.setattr(Connection, "begin_nested", interrupted)
    with pytest.raises(TimeoutError):
        unit.open()

    assert unit.session.scalar(text("select count(*) from inbox")) == 1


@pytest.mark.parametrize("place", ["on", "within", "off"])
def test_nobody_finds_a_connection_that_commits_by_itself(database_url, monkeypatch, place):
    """Wherever a soft time limit comes while statements are to count at once."""
    app = WorkerApp("orders")
    app.configure(WorkerSettings(database_url=database_url, amqp_url="amqp://nobody:x@127.0.0.1:1/"))
    change = psycopg.Connection._set_autocommit

    def interrupted(connection, value):
        change(connection, value)
        if value == (place == "on"):
            raise SoftTimeLimitExceeded

    if place != "within":
        monkeypatch.setattr(psycopg.Connection, "_set_autocommit", interrupted)
    with pytest.raises(SoftTimeLimitExceeded), app.autocommit():
        if place == "within":
            raise SoftTimeLimitExceeded
    monkeypatch.undo()

    with app.connect() as connection:
        assert not connection.connection.driver_connection.autocommit
    app.dispose_connections()
