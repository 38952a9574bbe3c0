"""What a service answers about tasks, from its real tables and their real locks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from sqlalchemy import insert, select, text

from taskmesh.contracts.control import Inquiry, Sightings
from taskmesh.database import async_engine, migrate
from taskmesh.exchanges import DIRECT
from taskmesh.inbox import inbox, lock_key
from taskmesh.outbox import OutboxMessage, insert_messages
from taskmesh.sightings import answer

NOW = datetime.now(UTC)


@pytest.fixture
async def engine(database_url):
    migrate(database_url, scripts=None)
    engine = async_engine(database_url)
    yield engine
    await engine.dispose()


@pytest.fixture
def ask(engine):
    """Ask for tasks, and return the sightings by task."""

    async def ask(*task_ids):
        inquiry = Inquiry(inquiry_id=uuid4(), task_ids=task_ids, asked_at=NOW)
        async with engine.begin() as connection:
            message = await answer(connection, inquiry, "billing")
        said = Sightings.model_validate_json(message.body)
        assert said.inquiry_id == inquiry.inquiry_id
        return {item.task_id: item for item in said.items}

    return ask


async def begun(engine, task_id):
    async with engine.begin() as connection:
        await connection.execute(
            insert(inbox).values(
                task_id=task_id, sequence=-1, state="waiting", starts=1, started_at=NOW, worker="host:1"
            )
        )


async def put(engine, task_id, due_at):
    message = OutboxMessage(exchange=DIRECT, routing_key="billing", body=b"[]", task_id=task_id, due_at=due_at)
    async with engine.begin() as connection:
        await connection.execute(insert_messages([message]))


async def test_a_task_that_never_came_is_unknown(ask):
    task_id = uuid4()
    assert (await ask(task_id))[task_id].state == "unknown"


async def test_a_message_in_the_outbox_is_seen_with_its_due_time(ask, engine):
    task_id, due_at = uuid4(), NOW + timedelta(hours=1)
    await put(engine, task_id, due_at)

    seen = (await ask(task_id))[task_id]

    assert (seen.state, seen.due_at) == ("outbox", due_at)


@pytest.mark.parametrize("state", ["succeeded", "failed", "expired", "cancelled"])
async def test_a_task_that_has_ended_is_seen_as_the_inbox_has_it(ask, engine, state):
    task_id = uuid4()
    async with engine.begin() as connection:
        await connection.execute(insert(inbox).values(task_id=task_id, sequence=3, state=state, starts=2))

    seen = (await ask(task_id))[task_id]

    assert (seen.state, seen.sequence, seen.starts, seen.alive) == (state, 3, 2, None)


async def test_a_task_between_two_attempts_waits(ask, engine):
    task_id = uuid4()
    async with engine.begin() as connection:
        await connection.execute(insert(inbox).values(task_id=task_id, sequence=0, state="waiting", starts=1))
    assert (await ask(task_id))[task_id].state == "waiting"


async def test_a_task_whose_next_attempt_is_in_the_outbox_waits_there(ask, engine):
    task_id = uuid4()
    async with engine.begin() as connection:
        await connection.execute(insert(inbox).values(task_id=task_id, sequence=0, state="waiting", starts=1))
    await put(engine, task_id, NOW)

    seen = (await ask(task_id))[task_id]

    assert (seen.state, seen.sequence) == ("outbox", 0)


async def test_a_task_runs_while_somebody_holds_its_row(ask, engine):
    task_id = uuid4()
    await begun(engine, task_id)
    async with engine.begin() as worker:
        await worker.execute(text("update inbox set worker = worker where task_id = :id"), {"id": task_id})

        seen = (await ask(task_id))[task_id]

    assert (seen.state, seen.alive, seen.worker) == ("running", True, "host:1")


async def test_a_task_runs_while_somebody_holds_its_advisory_lock(ask, engine):
    task_id = uuid4()
    await begun(engine, task_id)
    async with engine.begin() as worker:
        await worker.execute(text("select pg_advisory_xact_lock(:key)"), {"key": lock_key(task_id)})
        assert (await ask(task_id))[task_id].alive is True


async def test_a_task_that_was_begun_and_that_nobody_holds_has_lost_its_worker(ask, engine):
    task_id = uuid4()
    await begun(engine, task_id)

    seen = (await ask(task_id))[task_id]

    assert (seen.state, seen.alive) == ("running", False)


async def test_no_lock_is_left_behind_while_the_caller_has_not_committed(engine):
    task_id = uuid4()
    await begun(engine, task_id)
    inquiry = Inquiry(inquiry_id=uuid4(), task_ids=(task_id,), asked_at=NOW)
    async with engine.begin() as asking, engine.begin() as worker:
        await answer(asking, inquiry, "billing")

        row = select(inbox.c.task_id).where(inbox.c.task_id == task_id).with_for_update(nowait=True)
        assert (await worker.execute(row)).scalar_one() == task_id
        lock = text("select pg_try_advisory_xact_lock(:key)")
        assert (await worker.execute(lock, {"key": lock_key(task_id)})).scalar_one()


async def test_a_task_that_is_asked_for_twice_is_answered_once(ask):
    task_id = uuid4()
    assert list(await ask(task_id, task_id)) == [task_id]
