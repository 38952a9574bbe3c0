"""What is to be called after the commit is called after the commit, and only then."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest
from sqlalchemy import text

from taskmesh.database import migrate, sync_engine
from taskmesh.errors import TaskCancelled
from taskmesh.inbox import InboxState
from taskmesh.worker.unit import Key, Unit


@pytest.fixture
def engine(database_url: str) -> Iterator:
    migrate(database_url, scripts=None)
    engine = sync_engine(database_url)
    yield engine
    engine.dispose()


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
