"""Control messages, against a real database and a real broker: what a service makes of each, whatever it knows."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pika
import psycopg
import pytest
from sqlalchemy import insert, select, update

from taskmesh import celery_protocol, control, lifecycle, topology
from taskmesh.celery_protocol import TaskMessage
from taskmesh.contracts.control import Cancellation, Inquiry, Pause
from taskmesh.contracts.lifecycle import TaskState
from taskmesh.control import ControlConsumer
from taskmesh.database import async_engine, migrate
from taskmesh.exchanges import DIRECT, LIFECYCLE
from taskmesh.inbox import cancellations, inbox, pauses
from taskmesh.management import Management
from taskmesh.outbox import insert_messages, outbox
from taskmesh.publishing import OutgoingMessage, Publisher
from taskmesh.testing.waiting import eventually

NOW = datetime.now(UTC)


@pytest.fixture
async def engine(database_url):
    migrate(database_url, scripts=None)
    engine = async_engine(database_url)
    yield engine
    await engine.dispose()


def cancellation(**fields):
    return Cancellation(**{"task_id": uuid4(), "type": "billing.invoice.issue", "requested_at": NOW} | fields)


async def known(engine, task_id, **fields):
    """Let the inbox know the task."""
    async with engine.begin() as connection:
        await connection.execute(insert(inbox).values(task_id=task_id, **{"sequence": 0, "state": "waiting"} | fields))


async def state(engine, task_id):
    async with engine.connect() as connection:
        return await connection.scalar(select(inbox.c.state).where(inbox.c.task_id == task_id))


async def told(engine, task_id):
    """What the ledger will be told of the task."""
    async with engine.connect() as connection:
        bodies = await connection.scalars(select(outbox.c.body).where(outbox.c.exchange == LIFECYCLE))
        return [event for body in bodies for event in lifecycle.decode(body) if event.task_id == task_id]


async def waiting(engine, task_id):
    """How many messages of the task the outbox holds."""
    async with engine.connect() as connection:
        return len((await connection.execute(select(outbox.c.id).where(outbox.c.task_id == task_id))).all())


@pytest.mark.parametrize(
    "message",
    [
        Cancellation(task_id=uuid4(), type="billing.invoice.issue", requested_at=NOW, force=True, reason="twice"),
        Pause(paused=True, at=NOW),
        Inquiry(inquiry_id=uuid4(), task_ids=(uuid4(),), asked_at=NOW),
    ],
)
def test_a_control_message_reads_as_it_was_written(message):
    outgoing = control.outgoing("billing", message)

    assert (outgoing.exchange, outgoing.routing_key, outgoing.task_id) == (DIRECT, "billing.control", None)
    assert control.decode(outgoing.body) == message


async def test_a_task_that_never_came_is_settled_and_told_once(engine):
    """Its message may come later: no attempt can be claimed then."""
    unwanted = cancellation(parent_id=uuid4(), root_id=uuid4())

    await control.apply(engine, [unwanted], "billing")
    await control.apply(engine, [unwanted], "billing")

    assert await state(engine, unwanted.task_id) == "cancelled"
    [event] = await told(engine, unwanted.task_id)
    assert (event.state, event.type, event.service) == (TaskState.CANCELLED, unwanted.type, "billing")
    assert (event.root_id, event.parent_id) == (unwanted.root_id, unwanted.parent_id)


async def test_a_retry_that_waits_is_taken_out_of_the_outbox(engine):
    unwanted = cancellation()
    await known(engine, unwanted.task_id, sequence=2, starts=3)
    retry = celery_protocol.command(
        TaskMessage(type=unwanted.type, id=unwanted.task_id, retries=3), due_at=NOW + timedelta(hours=1)
    )
    async with engine.begin() as connection:
        await connection.execute(insert_messages([retry]))

    await control.apply(engine, [unwanted], "billing")

    assert await state(engine, unwanted.task_id) == "cancelled"
    assert await waiting(engine, unwanted.task_id) == 0
    assert [event.state for event in await told(engine, unwanted.task_id)] == ["cancelled"]


@pytest.mark.parametrize(
    "row",
    [
        {"started_at": NOW, "starts": 1, "sequence": -1},
        {"state": "succeeded"},
        {"state": "failed"},
        {"state": "expired"},
        {"state": "cancelled"},
    ],
)
async def test_a_task_that_was_begun_or_has_ended_is_left_alone(engine, row):
    """Whoever runs it sees the cancellation; what has ended stays as it ended."""
    unwanted = cancellation()
    await known(engine, unwanted.task_id, **row)

    await control.apply(engine, [unwanted], "billing")

    assert await state(engine, unwanted.task_id) == row.get("state", "waiting")
    assert await told(engine, unwanted.task_id) == []
    async with engine.connect() as connection:
        assert await connection.scalar(select(cancellations.c.task_id)) == unwanted.task_id


async def test_a_row_that_an_attempt_holds_is_not_waited_for(engine):
    """The attempt has it in its last transaction, changed or only locked."""
    changed, locked = cancellation(), cancellation()
    for unwanted in (changed, locked):
        await known(engine, unwanted.task_id)
    async with engine.connect() as attempt:
        await attempt.execute(update(inbox).where(inbox.c.task_id == changed.task_id).values(state="succeeded"))
        await attempt.execute(select(inbox).where(inbox.c.task_id == locked.task_id).with_for_update())

        async with asyncio.timeout(1.5):
            await control.apply(engine, [changed, locked], "billing")

    assert [await state(engine, unwanted.task_id) for unwanted in (changed, locked)] == ["waiting", "waiting"]


async def test_a_message_that_the_relay_is_publishing_is_not_waited_for(engine):
    """It is delivered, and then skipped."""
    unwanted = cancellation()
    await known(engine, unwanted.task_id)
    async with engine.begin() as connection:
        await connection.execute(
            insert_messages([celery_protocol.command(TaskMessage(type=unwanted.type, id=unwanted.task_id))])
        )
    async with engine.connect() as relay:
        await relay.execute(select(outbox.c.id).with_for_update())

        async with asyncio.timeout(1.5):
            await control.apply(engine, [unwanted], "billing")

    assert await state(engine, unwanted.task_id) == "cancelled"
    assert await waiting(engine, unwanted.task_id) == 1


async def test_force_may_be_asked_for_later_and_is_not_taken_back(engine):
    unwanted = cancellation(reason="first")

    for force in (False, True, False):
        await control.apply(engine, [unwanted.model_copy(update={"force": force, "reason": str(force)})], "billing")

    async with engine.connect() as connection:
        [row] = await connection.execute(select(cancellations.c.force, cancellations.c.reason))
    assert row == (True, "False")


async def paused_at(engine):
    async with engine.connect() as connection:
        return await connection.scalar(select(pauses.c.paused_at))


async def test_an_older_pause_does_not_override_a_newer_one(engine):
    """Messages may be handed over twice, and in another order."""
    first, second, third = (NOW + timedelta(seconds=n) for n in range(3))

    await control.apply(engine, [Pause(paused=False, at=second)], "billing")
    await control.apply(engine, [Pause(paused=True, at=first)], "billing")
    assert await paused_at(engine) is None

    await control.apply(engine, [Pause(paused=True, at=third)], "billing")
    await control.apply(engine, [Pause(paused=False, at=second)], "billing")
    assert await paused_at(engine) == third


async def test_paused_again_a_service_has_been_paused_since_the_first_time(engine):
    later = NOW + timedelta(minutes=1)

    await control.apply(engine, [Pause(paused=True, at=NOW), Pause(paused=True, at=later)], "billing")

    assert await paused_at(engine) == NOW


async def test_an_inquiry_is_answered_through_the_outbox(engine):
    await control.apply(engine, [Inquiry(inquiry_id=uuid4(), task_ids=(uuid4(),), asked_at=NOW)], "billing")

    async with engine.connect() as connection:
        assert await connection.scalar(select(outbox.c.routing_key)) == "task.sighted.billing"


@contextlib.asynccontextmanager
async def consuming(engine, broker):
    stop = asyncio.Event()
    running = asyncio.create_task(ControlConsumer(engine, broker.amqp_url, "billing").run(stop))
    try:
        yield
    finally:
        stop.set()
        await asyncio.wait_for(running, 15)


def declare(broker):
    with Management(broker.management_url) as management:
        for wanted in (topology.gateway_topology(), topology.worker_topology("billing", [])):
            topology.declare(wanted, amqp_url=broker.amqp_url, management=management)


async def send(broker, *bodies):
    async with Publisher(broker.amqp_url, name="test") as publisher:
        for body in bodies:
            await publisher.publish([OutgoingMessage(exchange=DIRECT, routing_key="billing.control", body=body)])


async def until(condition):
    loop = asyncio.get_running_loop()
    await asyncio.to_thread(eventually, lambda: asyncio.run_coroutine_threadsafe(condition(), loop).result())


async def test_what_is_no_control_message_is_dead_lettered_and_the_next_one_is_obeyed(engine, broker):
    """No text, no kind and no time can stop the consumer."""
    declare(broker)
    unwanted = cancellation()
    bad = [b"", b"\xff\x00", b"[]", b'{"kind": "explode"}', b'{"kind": "cancel", "task_id": 7}', b'{"kind": "pause"}']

    async with consuming(engine, broker):
        await send(broker, *bad, control.outgoing("billing", unwanted).body)
        await until(lambda: is_cancelled(engine, unwanted))

    assert await asyncio.to_thread(dead_letters, broker, len(bad))


async def is_cancelled(engine, unwanted):
    return await state(engine, unwanted.task_id) == "cancelled"


def dead_letters(broker, count):
    """Wait for so many of them."""
    with pika.BlockingConnection(pika.URLParameters(broker.amqp_url)) as connection:
        channel = connection.channel()
        return eventually(
            lambda: channel.queue_declare("gateway.dead-letters", passive=True).method.message_count == count
        )


async def test_an_outage_of_the_database_is_waited_out(engine, broker, database_url, postgres, caplog):
    """The message goes back to its queue, and is obeyed later."""
    declare(broker)
    unwanted = cancellation()
    name = engine.url.database
    with psycopg.connect(postgres, autocommit=True) as server:
        server.execute(f"alter database {name} allow_connections false")
        server.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (name,))
        async with consuming(engine, broker):
            await send(broker, control.outgoing("billing", unwanted).body)
            await until(lambda: was_logged(caplog, "batch failed"))
            server.execute(f"alter database {name} allow_connections true")

            await until(lambda: is_cancelled(engine, unwanted))


async def was_logged(caplog, message):
    return message in caplog.messages
