"""What comes from the broker is in the ledger before it is acknowledged, and nothing of it is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pika
import pytest
import pytest_asyncio
from sqlalchemy import select

from gateway import idempotency, ledger, sightings
from gateway import projector as gateway_projector
from gateway.dead_letters import letter as dead_letter
from gateway.models import dead_letters as letters_table
from gateway.models import idempotency_keys, manifests, tasks
from gateway.projector import QUEUES, Projector, keep_house
from taskmesh import celery_protocol, lifecycle
from taskmesh.celery_protocol import TaskMessage
from taskmesh.consuming import BatchConsumer, Delivery
from taskmesh.contracts.control import Sighting, Sightings
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskKind, TaskState
from taskmesh.contracts.manifest import Manifest, TypeManifest
from taskmesh.management import Management
from taskmesh.topology import (
    COMMANDS,
    DEAD_QUEUE,
    LIFECYCLE,
    LIFECYCLE_QUEUE,
    declare,
    gateway_topology,
    worker_topology,
)

TYPE = "greeter.person.greet"


def event(state: TaskState = TaskState.RUNNING, **fields: Any) -> LifecycleEvent:
    values = {"task_id": uuid4(), "type": TYPE, "service": "greeter", "at": datetime.now(UTC)} | fields
    return LifecycleEvent(state=state, **values)


def delivery(
    body: bytes, *, queue: str = LIFECYCLE_QUEUE, key: str = "task.running.greeter", **headers: Any
) -> Delivery:
    return Delivery(
        queue=queue,
        exchange=LIFECYCLE,
        routing_key=key,
        headers=headers,
        properties={"content_type": "application/json"},
        body=body,
        delivery_count=0,
        tag=1,
    )


def dead(
    message: TaskMessage | None = None, *, reason: str = "rejected", queue: str = "greeter", **changes: Any
) -> Delivery:
    """A dead letter as RabbitMQ delivers it."""
    headers, properties, body = celery_protocol.encode(message or TaskMessage(type=TYPE, id=uuid4()))
    death = {
        "count": 1,
        "reason": reason,
        "queue": queue,
        "exchange": COMMANDS,
        "routing-keys": [TYPE],
        "time": datetime(2026, 6, 1),  # noqa: DTZ001 - pika gives naive UTC
    }
    headers |= {"x-death": [death], "x-first-death-queue": queue, "x-first-death-reason": reason}
    return Delivery(
        queue=DEAD_QUEUE,
        exchange="taskmesh.dead",
        routing_key=queue,
        headers=headers | changes.pop("headers", {}),
        properties=properties,
        body=changes.pop("body", body),
        delivery_count=0,
        tag=1,
    )


@pytest.fixture
def projector(gateway_engine) -> Projector:
    return Projector(gateway_engine)


async def rows(engine, table) -> list[Any]:
    async with engine.connect() as connection:
        return list((await connection.execute(select(table))).all())


async def state_of(engine, task_id: UUID) -> str:
    async with engine.connect() as connection:
        return (await ledger.get_task(connection, task_id)).state


async def test_one_batch_holds_lifecycle_events_manifests_and_dead_letters(projector, gateway_engine):
    announced = Manifest(
        service="greeter",
        release="1",
        announced_at=datetime.now(UTC),
        types=(TypeManifest(type=TYPE, kind=TaskKind.COMMAND, queue="greeter", payload_schema={}),),
    )

    await projector.handle(
        [
            delivery(lifecycle.encode([event(), event()])),
            delivery(announced.model_dump_json().encode(), key="manifest.greeter"),
            dead(),
        ]
    )

    assert len(await rows(gateway_engine, tasks)) == 3
    assert [row.service for row in await rows(gateway_engine, manifests)] == ["greeter"]
    assert len(await rows(gateway_engine, letters_table)) == 1


NO_OFFSET = f"""[{{"task_id": "{UUID(int=1)}", "type": "{TYPE}", "state": "running", "service": "greeter",
    "at": "2026-06-01T12:00:00"}}]""".encode()
"""A time without an offset cannot be compared with others: one such report would hold up all that come with it."""


@pytest.mark.parametrize("body", [b"{", b"[{}]", b'{"service": "x"}', b"\xff", NO_OFFSET])
@pytest.mark.parametrize("key", ["task.running.greeter", "manifest.greeter"])
async def test_a_message_that_cannot_be_read_is_kept_and_the_others_of_its_batch_are_applied(
    projector, gateway_engine, body, key
):
    good = event()

    await projector.handle([delivery(body, key=key), delivery(lifecycle.encode([good]))])

    [letter] = await rows(gateway_engine, letters_table)
    assert (letter.reason, letter.queue, bytes(letter.body), letter.routing_key) == (
        "malformed",
        LIFECYCLE_QUEUE,
        body,
        key,
    )
    assert await state_of(gateway_engine, good.task_id) == "running"


async def test_a_message_that_postgresql_cannot_keep_is_found_and_kept_apart(projector, gateway_engine):
    good = [event(), event()]
    bad = event(TaskState.SUCCEEDED, result={"text": "a\x00b"})

    await projector.handle([delivery(lifecycle.encode([one])) for one in (good[0], bad, good[1])])

    assert [await state_of(gateway_engine, one.task_id) for one in good] == ["running", "running"]
    [letter] = await rows(gateway_engine, letters_table)
    assert letter.reason == "malformed"


async def test_a_dead_letter_fails_its_task_and_is_kept_as_it_was(projector, gateway_engine):
    message = TaskMessage(type=TYPE, id=uuid4(), payload={"name": "Ada"}, retries=2)

    await projector.handle([dead(message, reason="delivery_limit")])

    async with gateway_engine.connect() as connection:
        task = await ledger.get_task(connection, message.id)
    assert (task.state, task.sequence, task.service, task.error["code"]) == ("failed", 2, "greeter", "poison")
    [letter] = await rows(gateway_engine, letters_table)
    assert (letter.task_id, letter.type, letter.queue, letter.exchange, letter.routing_key) == (
        message.id,
        TYPE,
        "greeter",
        COMMANDS,
        TYPE,
    )
    assert json.loads(bytes(letter.body))[1] == {"name": "Ada"}
    assert letter.headers["x-death"][0]["reason"] == "delivery_limit"


async def test_a_dead_letter_that_comes_twice_is_kept_once(projector, gateway_engine):
    letter = dead()

    await projector.handle([letter, letter])
    await projector.handle([letter])

    assert len(await rows(gateway_engine, letters_table)) == 1


async def test_a_dead_letter_does_not_undo_what_the_worker_has_said(projector, gateway_engine):
    task_id = uuid4()

    await projector.handle(
        [
            dead(TaskMessage(type=TYPE, id=task_id)),
            delivery(lifecycle.encode([event(TaskState.SUCCEEDED, task_id=uuid4())])),
        ]
    )
    await projector.handle([delivery(lifecycle.encode([event(TaskState.SUCCEEDED, task_id=task_id)]))])

    assert await state_of(gateway_engine, task_id) == "failed"


async def test_a_dead_event_fails_the_listeners_task_and_no_other(projector, gateway_engine):
    event_id = uuid4()

    await projector.handle(
        [dead(TaskMessage(type="a.b.done", id=event_id, kind=TaskKind.EVENT), queue="greeter.events")]
    )

    [task] = await rows(gateway_engine, tasks)
    assert (task.id, task.kind, task.service) == (
        celery_protocol.listener_task_id(event_id, "greeter"),
        "event",
        "greeter",
    )


async def test_a_task_whose_message_timed_out_is_expired(projector, gateway_engine):
    message = TaskMessage(type=TYPE, id=uuid4())

    await projector.handle([dead(message, reason="expired")])

    assert await state_of(gateway_engine, message.id) == "expired"


async def test_a_letter_whose_body_is_unreadable_still_fails_the_task_that_its_header_names(projector, gateway_engine):
    message = TaskMessage(type=TYPE, id=uuid4())

    await projector.handle([dead(message, body=b"\x00\xff not json")])

    [letter] = await rows(gateway_engine, letters_table)
    assert (letter.task_id, bytes(letter.body)) == (message.id, b"\x00\xff not json")
    async with gateway_engine.connect() as connection:
        assert (await ledger.get_task(connection, message.id)).error["code"] == "malformed"


@pytest.mark.parametrize(
    "headers",
    [{"id": "nobody"}, {"id": None, "task": "\x00"}, {"x-death": "odd", "x": b"\xff\x00", "at": datetime.now(UTC)}],
)
async def test_a_letter_with_the_oddest_headers_is_kept(projector, gateway_engine, headers):
    await projector.handle([dead(headers=headers, body=b"?")])

    assert len(await rows(gateway_engine, letters_table)) == 1


def _key(name):
    return idempotency.Key(api_key_id=uuid4(), name=name, request_sha256=b"", response=b"")


async def test_old_idempotency_keys_are_forgotten_and_young_ones_kept(gateway_engine):
    async with gateway_engine.begin() as connection:
        for name in ("old", "young"):
            await idempotency.claim(connection, _key(name))
        old = idempotency_keys.c.key == "old"
        await connection.execute(
            idempotency_keys.update().where(old).values(created_at=datetime.now(UTC) - timedelta(hours=49))
        )

        forgotten = await idempotency.forget(connection, timedelta(hours=48), limit=10)

    assert forgotten == 1
    assert [row.key for row in await rows(gateway_engine, idempotency_keys)] == ["young"]


async def test_a_long_backlog_of_old_idempotency_keys_is_forgotten_in_pieces(gateway_engine, monkeypatch, eventually):
    """One statement for all of them would run into the statement's time limit, again and again."""
    monkeypatch.setattr(gateway_projector, "FORGOTTEN_AT_ONCE", 3)
    async with gateway_engine.begin() as connection:
        for name in range(8):
            await idempotency.claim(connection, _key(str(name)))
        await connection.execute(idempotency_keys.update().values(created_at=datetime.now(UTC) - timedelta(hours=49)))
    stop = asyncio.Event()

    house = asyncio.create_task(
        keep_house(gateway_engine, stop, forget_keys_after=timedelta(hours=48), forget_letters_after=timedelta(days=30))
    )

    async def nothing_is_left() -> bool:
        return not await rows(gateway_engine, idempotency_keys)

    await eventually(nothing_is_left)
    stop.set()
    await house


@asynccontextmanager
async def consuming(broker, projector: Projector) -> AsyncIterator[None]:
    stop = asyncio.Event()
    consumer = BatchConsumer(broker.amqp_url, QUEUES, projector.handle, name="test-projector")
    running = asyncio.create_task(consumer.run(stop))
    try:
        yield
    finally:
        stop.set()
        await running


@pytest_asyncio.fixture
async def channel(broker) -> AsyncIterator[Any]:
    """A channel to a broker on which the gateway and one worker service are set up."""

    def set_up() -> pika.BlockingConnection:
        with Management(broker.management_url) as management:
            for topology in (gateway_topology(), worker_topology("greeter", [])):
                declare(topology, amqp_url=broker.amqp_url, management=management)
        return pika.BlockingConnection(pika.URLParameters(broker.amqp_url))

    connection = await asyncio.to_thread(set_up)
    yield connection.channel()
    connection.close()


async def test_what_workers_publish_and_what_they_refuse_arrives_through_the_broker(
    broker, channel, projector, gateway_engine, eventually
):
    """The real path: exchange, queue, consumer, commit; and a rejected message by way of the dead-letter exchange."""
    ran, refused = event(TaskState.SUCCEEDED), TaskMessage(type=TYPE, id=uuid4())
    persistent = pika.BasicProperties(content_type="application/json", delivery_mode=2)
    channel.basic_publish(LIFECYCLE, "task.succeeded.greeter", lifecycle.encode([ran]), persistent)
    channel.basic_publish(LIFECYCLE, "task.succeeded.greeter", b"garbage", persistent)
    headers, properties, body = celery_protocol.encode(refused)
    channel.basic_publish(COMMANDS, TYPE, body, pika.BasicProperties(headers=headers, **properties))
    for method, _, _ in channel.consume("greeter", inactivity_timeout=10):
        channel.basic_reject(method.delivery_tag, requeue=False)
        break
    channel.cancel()

    async with consuming(broker, projector):
        await eventually(lambda: _ended(gateway_engine, {ran.task_id: "succeeded", refused.id: "failed"}))
        await eventually(lambda: _is_empty(channel))

    letters = {row.reason: row for row in await rows(gateway_engine, letters_table)}
    assert set(letters) == {"rejected", "malformed"}
    assert letters["rejected"].queue == "greeter"
    assert letters["rejected"].died_at is not None


async def _ended(engine, states: dict[UUID, str]) -> bool:
    found = {row.id: row.state for row in await rows(engine, tasks)}
    return found == states


def _is_empty(channel) -> bool:
    counts = [channel.queue_declare(queue, passive=True).method.message_count for queue in QUEUES]
    return counts == [0, 0]


def test_a_letters_fingerprint_tells_two_deaths_of_one_message_apart():
    first, second = dead_letter.from_broker(dead(reason="rejected")), dead_letter.from_broker(dead(reason="expired"))

    assert first.fingerprint() != second.fingerprint()


async def test_a_finished_task_comes_with_its_children_and_one_task_for_each_listener(projector, gateway_engine):
    """A tree is never finished and incomplete at the same time."""
    root, child, emitted = uuid4(), uuid4(), uuid4()
    listening = TypeManifest(
        type="greeter.person.greeted", kind=TaskKind.EVENT, queue="mailer.events", payload_schema={"type": "object"}
    )
    for service in ("mailer", "counter"):
        announced = Manifest(service=service, release="1", types=(listening,), announced_at=datetime.now(UTC))
        await projector.handle([delivery(announced.model_dump_json().encode(), key=f"manifest.{service}")])
    children = (
        event(TaskState.QUEUED, task_id=child, root_id=root, parent_id=root),
        event(
            TaskState.QUEUED,
            task_id=emitted,
            event_id=emitted,
            kind=TaskKind.EVENT,
            type="greeter.person.greeted",
            root_id=root,
            parent_id=root,
        ),
    )

    outcome = event(TaskState.SUCCEEDED, task_id=root, root_id=root, children=children)
    await projector.handle([delivery(lifecycle.encode([outcome]))])

    async with gateway_engine.connect() as connection:
        told = await connection.execute(
            select(tasks.c.id, tasks.c.state, tasks.c.service).where(tasks.c.root_id == root)
        )
        found = {(row.id, row.state, row.service) for row in told}
    assert found == {
        (root, "succeeded", "greeter"),
        (child, "queued", "greeter"),
        (celery_protocol.listener_task_id(emitted, "mailer"), "queued", "mailer"),
        (celery_protocol.listener_task_id(emitted, "counter"), "queued", "counter"),
    }


async def test_what_a_service_has_seen_is_kept_and_its_newest_word_counts(projector, gateway_engine):
    task_id = uuid4()
    now = datetime.now(UTC)

    def said(state: str, at: datetime) -> Delivery:
        items = (Sighting(task_id=task_id, state=state),)
        answer = Sightings(inquiry_id=uuid4(), service="greeter", at=at, items=items)
        return delivery(answer.model_dump_json().encode(), key="task.sighted.greeter")

    await projector.handle([said("succeeded", now), said("unknown", now - timedelta(minutes=1))])
    await projector.handle([said("waiting", now - timedelta(minutes=2))])

    async with gateway_engine.connect() as connection:
        seen = await sightings.of_task(connection, task_id, "greeter")
    assert seen is not None
    assert seen.state == "succeeded"
