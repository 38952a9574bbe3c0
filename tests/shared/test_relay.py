"""The relay between a real PostgreSQL and a real RabbitMQ: every row leaves, at its time, and is never lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import psycopg
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from sqlalchemy import func, select, text

from taskmesh import celery_protocol, lifecycle, telemetry, topology
from taskmesh.celery_protocol import DUE_HEADER, PUBLISHED_HEADER, TaskMessage
from taskmesh.consuming import BatchConsumer
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskKind, TaskState
from taskmesh.contracts.manifest import Manifest
from taskmesh.database import async_engine, migrate
from taskmesh.errors import BrokerUnavailable
from taskmesh.exchanges import DIRECT, EVENTS
from taskmesh.health import Health
from taskmesh.management import Management
from taskmesh.outbox import NOTIFY_CHANNEL, OutboxMessage, insert_messages, outbox, outbox_watch
from taskmesh.outbox_watch import BUSY_PAUSE_SECONDS, MARGIN_SECONDS, PAUSE_SECONDS, WATCH_SECONDS
from taskmesh.publishing import Outcome
from taskmesh.relay import OutboxRow, Relay, ServiceHooks, announce_once
from taskmesh.testing.proxy import TcpProxy

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def declare(broker):
    def declare(*wanted):
        with Management(broker.management_url) as management:
            for one in wanted:
                topology.declare(one, amqp_url=broker.amqp_url, management=management)

    declare(topology.gateway_topology(), topology.worker_topology("billing", []))
    return declare


@pytest.fixture
async def engine(database_url, declare):
    migrate(database_url, scripts=None)
    engine = async_engine(database_url)
    yield engine
    await engine.dispose()


class Watched:
    """Hooks that keep what the relay tells them, and may act on it; `until` waits for a condition."""

    def __init__(self, act=None):
        self.rows = []
        self._act = act
        self._changed = asyncio.Event()

    async def published(self, connection, rows):
        if self._act is not None:
            await self._act(connection, rows)
        self.rows += rows
        self._changed.set()

    async def expired(self, connection, rows):
        await self.published(connection, rows)

    async def until(self, condition):
        async with asyncio.timeout(20):
            while not condition(self.rows):
                self._changed.clear()
                await self._changed.wait()


@contextlib.asynccontextmanager
async def relaying(engine, url, hooks=None, **options):
    stop = asyncio.Event()
    relay = Relay(engine, url, "billing", hooks=hooks, **options)
    running = asyncio.create_task(relay.run(stop))
    try:
        yield running
    finally:
        stop.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(running, 20)


async def put(engine, *messages):
    async with engine.begin() as connection:
        await connection.execute(insert_messages(messages))


async def rows_left(engine):
    async with engine.connect() as connection:
        return (await connection.execute(select(outbox).order_by(outbox.c.id))).all()


async def receive(url, queue, count):
    """The next `count` deliveries of a queue."""
    found, enough, stop = [], asyncio.Event(), asyncio.Event()

    async def handle(deliveries):
        found.extend(deliveries)
        if len(found) >= count:
            enough.set()

    running = asyncio.create_task(BatchConsumer(url, [queue], handle, name="test").run(stop))
    try:
        await asyncio.wait_for(enough.wait(), 20)
    finally:
        stop.set()
        await running
    return found


def command(type_="billing.invoice.issue", *, due_in=None, **fields):
    due_at = datetime.now(UTC) + due_in if due_in is not None else None
    return celery_protocol.command(TaskMessage(type=type_, id=uuid4(), payload={"n": 1}, **fields), due_at=due_at)


def lifecycle_message(state=TaskState.RUNNING, result=None):
    now = datetime.now(UTC)
    happened = LifecycleEvent(task_id=uuid4(), type="billing.x", state=state, at=now, service="billing", result=result)
    return lifecycle.message(happened)


async def test_a_row_leaves_as_it_was_written_and_is_deleted(engine, broker):
    message = command(priority=4, traceparent=TRACEPARENT, headers={"timelimit_of_ours": 2.5})
    await put(engine, message)

    async with relaying(engine, broker.amqp_url):
        [delivery] = await receive(broker.amqp_url, "billing", 1)

    assert (delivery.exchange, delivery.routing_key, delivery.body) == (
        message.exchange,
        message.routing_key,
        message.body,
    )
    added = {name: delivery.headers.pop(name) for name in (DUE_HEADER, PUBLISHED_HEADER)}
    assert delivery.headers == message.headers
    assert added[DUE_HEADER] <= added[PUBLISHED_HEADER] <= time.time_ns() // 1000
    assert delivery.properties == message.properties
    assert await rows_left(engine) == []


async def test_an_unroutable_row_is_put_back_blocks_nobody_and_leaves_when_its_queue_is_there(engine, broker, declare):
    hooks = Watched()
    good = [command() for _ in range(3)]
    await put(engine, command("email.message.send"), *good)

    async with relaying(engine, broker.amqp_url, hooks):
        await hooks.until(lambda rows: len(rows) == 3)
        await receive(broker.amqp_url, "billing", 3)
        [stuck] = await _until(engine, lambda rows: [row.failures for row in rows] == [1])
        await asyncio.to_thread(declare, topology.worker_topology("email", []))
        await receive(broker.amqp_url, "email", 1)

    assert "NO_ROUTE" in stuck.last_error
    assert stuck.due_at > stuck.created_at
    assert await rows_left(engine) == []


async def _until(engine, condition):
    async with asyncio.timeout(20):
        while not condition(rows := await rows_left(engine)):  # noqa: ASYNC110 - a table has no signal
            await asyncio.sleep(0.02)
    return rows


async def test_a_forbidden_row_is_put_back_with_the_broker_s_words(engine, broker):
    with Management(broker.management_url) as management:
        management.put_user(broker.vhost, "pw")
        topology.grant(management, broker.vhost, broker.vhost, topology.permissions("billing"))
    hooks = Watched()
    forbidden = OutboxMessage(exchange="taskmesh.dead", routing_key="x", body=b"")
    await put(engine, command(), forbidden, command())

    async with relaying(engine, f"amqp://{broker.vhost}:pw@{broker.amqp_url.rpartition('@')[2]}", hooks):
        await hooks.until(lambda rows: len(rows) == 2)
        [stuck] = await _until(engine, lambda rows: [row.failures for row in rows] == [1])

    assert "ACCESS_REFUSED" in stuck.last_error
    with Management(broker.management_url) as management:
        management.delete_user(broker.vhost)


async def test_two_relays_share_the_rows_and_publish_each_once(engine, broker, database_url):
    messages = [command() for _ in range(300)]
    await put(engine, *messages)
    other = async_engine(database_url)
    first, second = Watched(), Watched()

    async with (
        relaying(engine, broker.amqp_url, first, batch_size=10),
        relaying(other, broker.amqp_url, second, batch_size=10),
    ):
        deliveries = await receive(broker.amqp_url, "billing", 300)
        await _until(engine, lambda rows: not rows)
    await other.dispose()

    ids = [delivery.properties["message_id"] for delivery in deliveries]
    assert sorted(ids) == sorted(message.properties["message_id"] for message in messages)
    assert first.rows
    assert second.rows


async def test_a_scheduled_row_leaves_at_its_time_and_not_before(engine, broker):
    hooks = Watched()
    now, later = command(), command(due_in=timedelta(seconds=0.7))

    async with relaying(engine, broker.amqp_url, hooks, poll_seconds=30.0):
        await put(engine, later, now)
        await hooks.until(lambda rows: len(rows) == 2)
        left_at = datetime.now(UTC)

    assert [row.task_id for row in hooks.rows] == [now.task_id, later.task_id]
    assert timedelta(0) <= left_at - later.due_at < timedelta(seconds=0.5)


async def test_a_row_that_is_brought_forward_by_an_insert_elsewhere_does_not_wait_for_the_poll(engine, broker):
    """The trigger's notification wakes the relay; its poll would come half a minute later."""
    hooks = Watched()

    async with relaying(engine, broker.amqp_url, hooks, poll_seconds=30.0):
        for count in range(1, 4):
            await put(engine, command())
            await hooks.until(lambda rows, count=count: len(rows) == count)


@contextlib.asynccontextmanager
async def listening(database_url):
    """Counts the notifications that wake relays."""
    heard = []
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        connection.add_notify_handler(heard.append)
        await connection.execute(f"listen {NOTIFY_CHANNEL}")

        async def count():
            # A statement's answer brings the notifications that came before it.
            await connection.execute("select")
            return len(heard)

        yield count


async def is_watched(engine):
    async with engine.connect() as connection:
        statement = select(outbox_watch.c.until > func.clock_timestamp())
        return bool((await connection.execute(statement)).scalar_one_or_none())


async def keep_busy(engine):
    """Write rows until the relay keeps watch."""
    async with asyncio.timeout(20):
        while not await is_watched(engine):
            await put(engine, command())


async def test_a_busy_relay_need_not_be_woken(engine, broker, database_url):
    hooks = Watched()
    last = command()

    async with relaying(engine, broker.amqp_url, hooks, poll_seconds=30.0), listening(database_url) as count:
        await keep_busy(engine)
        before = await count()
        await put(engine, last)
        assert await count() == before
        await hooks.until(lambda rows: last.task_id in {row.task_id for row in rows})


async def test_a_row_that_trusted_in_a_watch_and_was_committed_after_it_leaves(engine, broker, database_url):
    hooks = Watched()
    last = command()

    async with relaying(engine, broker.amqp_url, hooks, poll_seconds=30.0), listening(database_url) as count:
        await keep_busy(engine)
        before = await count()
        async with engine.begin() as connection:
            await connection.execute(insert_messages([last]))
            while await is_watched(engine):  # noqa: ASYNC110 - a row has no signal
                await asyncio.sleep(0.005)
        assert await count() == before
        await hooks.until(lambda rows: last.task_id in {row.task_id for row in rows})


async def test_a_row_that_trusted_in_a_watch_leaves_although_the_look_before_it_took_long(engine, broker, database_url):
    """The look began under the watch and ended after it; the relay once slept then until its next poll."""
    slow, last = command(), command()
    looked, is_over = asyncio.Event(), asyncio.Event()

    async def act(_, rows):
        if slow.task_id in {row.task_id for row in rows}:
            looked.set()
            await is_over.wait()

    hooks = Watched(act)
    async with relaying(engine, broker.amqp_url, hooks, poll_seconds=30.0), listening(database_url) as count:
        await keep_busy(engine)
        # A look that has found nothing, so that the next one does not renew the watch.
        await _until(engine, lambda rows: not rows)
        await asyncio.sleep(2 * BUSY_PAUSE_SECONDS)
        before = await count()
        async with engine.begin() as connection:
            await connection.execute(insert_messages([last]))
            await put(engine, slow)
            await looked.wait()
            assert await count() == before
            await asyncio.sleep(WATCH_SECONDS + 2 * MARGIN_SECONDS)
        is_over.set()
        await hooks.until(lambda rows: last.task_id in {row.task_id for row in rows})


async def test_a_relay_that_has_gone_is_watching_no_longer_than_it_promised(engine, broker, database_url):
    async with relaying(engine, broker.amqp_url, poll_seconds=30.0):
        await keep_busy(engine)
    async with asyncio.timeout(5):
        while await is_watched(engine):  # noqa: ASYNC110 - a row has no signal
            await asyncio.sleep(0.005)

    async with listening(database_url) as count:
        await put(engine, command())
        assert await count() == 1


async def test_a_relay_with_little_to_do_keeps_no_watch(engine, broker):
    hooks = Watched()

    async with relaying(engine, broker.amqp_url, hooks, poll_seconds=30.0):
        for count in range(1, 7):
            await put(engine, command())
            await hooks.until(lambda rows, count=count: len(rows) == count)
            await asyncio.sleep(2 * PAUSE_SECONDS)
        async with engine.connect() as connection:
            assert (await connection.execute(select(outbox_watch))).all() == []


async def test_an_expired_row_is_not_published_and_is_reported(engine, broker):
    expired = command(expires_at=datetime.now(UTC) - timedelta(seconds=1), retries=2)
    good = command()
    await put(engine, expired, good)

    async with relaying(engine, broker.amqp_url, ServiceHooks("billing")):
        [delivery] = await receive(broker.amqp_url, "billing", 1)
        [report] = await receive(broker.amqp_url, "gateway.lifecycle", 1)

    [happened] = lifecycle.decode(report.body)
    assert delivery.properties["message_id"] == str(good.task_id)
    assert report.routing_key == "task.expired.billing"
    assert (happened.task_id, happened.state, happened.sequence) == (expired.task_id, TaskState.EXPIRED, 2)
    assert await rows_left(engine) == []


@pytest.mark.parametrize("seconds", [0.1, -1.0], ids=["due later", "due before its transaction began"])
async def test_a_delayed_task_is_reported_queued_when_it_leaves(engine, broker, seconds):
    root, parent = uuid4(), uuid4()
    delayed = command(
        due_in=timedelta(seconds=seconds), root_id=root, parent_id=parent, traceparent=TRACEPARENT, retries=1
    )
    at_once = command()
    await put(engine, delayed, at_once)

    async with relaying(engine, broker.amqp_url, ServiceHooks("billing")):
        [report] = await receive(broker.amqp_url, "gateway.lifecycle", 1)
        await _until(engine, lambda rows: not rows)

    [happened] = lifecycle.decode(report.body)
    assert report.routing_key == "task.queued.billing"
    assert (happened.task_id, happened.root_id, happened.parent_id) == (delayed.task_id, root, parent)
    assert (happened.kind, happened.attempt, happened.traceparent) == (TaskKind.COMMAND, 2, TRACEPARENT)


async def test_lifecycle_rows_of_one_state_travel_together(engine, broker):
    running = [lifecycle_message() for _ in range(450)]
    bulky = [lifecycle_message(TaskState.SUCCEEDED, result="x" * 100_000) for _ in range(6)]
    await put(engine, *running, *bulky)

    async with relaying(engine, broker.amqp_url, batch_size=1000):
        deliveries = await receive(broker.amqp_url, "gateway.lifecycle", 3 + 3)

    batches = [lifecycle.decode(delivery.body) for delivery in deliveries]
    sent = {happened["task_id"] for message in running + bulky for happened in json.loads(message.body)}
    assert sorted(len(batch) for batch in batches) == [2, 2, 2, 50, 200, 200]
    assert {str(happened.task_id) for batch in batches for happened in batch} == sent
    assert max(len(delivery.body) for delivery in deliveries) <= 256 * 1024
    assert await rows_left(engine) == []


async def test_a_relay_cancelled_between_publish_and_commit_publishes_again(engine, broker):
    """At least once: the row was not deleted, so the next relay sends it again."""
    published = asyncio.Event()

    async def hang(*_):
        published.set()
        await asyncio.Event().wait()

    await put(engine, command())
    async with relaying(engine, broker.amqp_url, Watched(hang)) as running:
        await asyncio.wait_for(published.wait(), 20)
        running.cancel()

    async with relaying(engine, broker.amqp_url):
        first, second = await receive(broker.amqp_url, "billing", 2)

    assert first.properties["message_id"] == second.properties["message_id"]
    assert await rows_left(engine) == []


RELAY_THAT_HANGS_BEFORE_ITS_COMMIT = """
import asyncio, sys
from taskmesh.database import async_engine
from taskmesh.relay import Relay
class Hang:
    async def published(self, connection, rows):
        print("published", len(rows), flush=True)
        await asyncio.Event().wait()
    expired = published
asyncio.run(Relay(async_engine(sys.argv[1]), sys.argv[2], "billing", hooks=Hang()).run(asyncio.Event()))
"""


async def test_a_relay_killed_between_publish_and_commit_frees_its_rows_at_once(engine, broker, database_url):
    await put(engine, *(command() for _ in range(20)))
    arguments = ("-c", RELAY_THAT_HANGS_BEFORE_ITS_COMMIT, database_url, broker.amqp_url)
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    assert await asyncio.wait_for(process.stdout.readline(), 30) == b"published 20\n"

    os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    async with relaying(engine, broker.amqp_url):
        deliveries = await receive(broker.amqp_url, "billing", 40)
        await _until(engine, lambda rows: not rows)

    assert len({delivery.properties["message_id"] for delivery in deliveries}) == 20


async def test_a_hook_that_fails_neither_repeats_messages_nor_blocks_the_relay(engine, broker, caplog):
    async def fail(connection, _):
        await connection.execute(text("select 1/0"))

    await put(engine, command())

    async with relaying(engine, broker.amqp_url, Watched(fail)):
        await _until(engine, lambda rows: not rows)
        await put(engine, command())
        deliveries = await receive(broker.amqp_url, "billing", 2)
        await _until(engine, lambda rows: not rows)

    assert len({delivery.properties["message_id"] for delivery in deliveries}) == 2
    assert "relay hook failed" in caplog.text


async def test_rows_wait_through_an_outage_of_the_broker_which_is_logged_once(engine, broker, caplog, tmp_path):
    caplog.set_level("INFO", logger="taskmesh.relay")
    hooks = Watched()

    async with (
        TcpProxy(broker.amqp_url) as proxy,
        relaying(engine, proxy.url, hooks, health=Health(tmp_path, "billing-relay"), poll_seconds=0.05),
    ):
        await put(engine, command())
        await hooks.until(lambda rows: len(rows) == 1)
        await proxy.refuse()
        await put(engine, command())
        async with asyncio.timeout(20):
            while "relay interrupted" not in caplog.text:  # noqa: ASYNC110 - a log has no signal
                await asyncio.sleep(0.02)
        assert (tmp_path / "billing-relay.ready").exists()
        assert len(await rows_left(engine)) == 1
        await proxy.accept()
        await hooks.until(lambda rows: len(rows) == 2)

    assert caplog.text.count("relay interrupted") == 1
    assert caplog.text.count("relay works again") == 1
    assert not (tmp_path / "billing-relay.ready").exists()


async def test_rows_leave_after_every_database_connection_was_cut(engine, broker, database_url):
    hooks = Watched()
    own = async_engine(database_url)

    async with relaying(own, broker.amqp_url, hooks, poll_seconds=30.0):
        await put(engine, command())
        await _until(engine, lambda rows: not rows)
        others = "datname = current_database() and pid <> pg_backend_pid()"
        async with engine.connect() as connection:
            await connection.execute(text(f"select pg_terminate_backend(pid) from pg_stat_activity where {others}"))
        await engine.dispose()
        await put(engine, command())
        await hooks.until(lambda rows: len({row.task_id for row in rows}) == 2)
    await own.dispose()


async def test_a_batch_whose_confirms_are_lost_is_published_again(engine, broker):
    async with TcpProxy(broker.amqp_url) as proxy, relaying(engine, proxy.url, poll_seconds=0.1):
        await put(engine, command())
        await receive(broker.amqp_url, "billing", 1)
        await _until(engine, lambda rows: not rows)
        proxy.stall()
        await put(engine, *(command() for _ in range(8)))
        await receive(broker.amqp_url, "billing", 8)
        proxy.cut()
        proxy.resume()
        await receive(broker.amqp_url, "billing", 8)
        await _until(engine, lambda rows: not rows)


async def test_a_message_that_costs_the_connection_each_time_steps_aside_for_the_others(engine, broker):
    """Over a header that fits no frame the broker closes the connection, not the channel."""
    good = [command() for _ in range(5)]
    headers = {"note": "x" * 200_000}
    bad = OutboxMessage(exchange="taskmesh.commands", routing_key="billing.x", body=b"{}", headers=headers)
    await put(engine, *good[:2], bad, *good[2:])

    async with relaying(engine, broker.amqp_url, poll_seconds=0.1):
        rows = await _until(engine, lambda rows: len(rows) == 1)

    assert rows[0].headers == headers
    assert rows[0].failures >= 1


async def test_the_manifest_is_announced_at_the_start_and_again(engine, broker):
    release = iter(range(100))

    def manifest():
        return Manifest(service="billing", release=str(next(release)), types=(), announced_at=datetime.now(UTC))

    async with relaying(engine, broker.amqp_url, announce=manifest, announce_seconds=0.1):
        first, second = (await receive(broker.amqp_url, "gateway.lifecycle", 2))[:2]

    assert {first.routing_key, second.routing_key} == {"manifest.billing"}
    assert [Manifest.model_validate_json(delivery.body).release for delivery in (first, second)] == ["0", "1"]


async def test_a_relay_that_can_no_longer_announce_ends_and_says_why(engine, broker):
    """Started again it may recover; left running it would be deaf in one ear."""

    def manifest() -> Manifest:
        raise ZeroDivisionError

    relay = Relay(engine, broker.amqp_url, "billing", announce=manifest)

    with pytest.raises(ExceptionGroup) as ended:
        await relay.run(asyncio.Event())

    assert ended.group_contains(ZeroDivisionError)


async def test_setup_announces_once_and_learns_whether_anybody_heard(broker):
    manifest = Manifest(service="billing", release="1", types=(), announced_at=datetime.now(UTC))
    with Management(broker.management_url) as management:
        topology.declare(topology.worker_topology("billing", []), amqp_url=broker.amqp_url, management=management)
        unheard = await announce_once(broker.amqp_url, manifest)
        topology.declare(topology.gateway_topology(), amqp_url=broker.amqp_url, management=management)
        heard = await announce_once(broker.amqp_url, manifest)

    assert (unheard.outcome, heard.outcome) == (Outcome.RETURNED, Outcome.CONFIRMED)
    with pytest.raises(BrokerUnavailable):
        await announce_once("amqp://a:b@127.0.0.1:1/x", manifest)


async def test_a_publish_is_a_producer_span_in_the_message_s_own_trace(engine, broker, monkeypatch):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("test"))
    monkeypatch.setattr(telemetry, "is_exporting", lambda: True)
    routed, lost = command(traceparent=TRACEPARENT), command("nobody.x.y", traceparent=TRACEPARENT)
    untraced = command()
    await put(engine, routed, lost, untraced, lifecycle_message())

    async with relaying(engine, broker.amqp_url):
        deliveries = await receive(broker.amqp_url, "billing", 2)
        await _until(engine, lambda rows: [row.failures for row in rows] == [1])

    published = [span for span in exporter.get_finished_spans() if span.name == "publish taskmesh.commands"]
    good, bad = sorted(published[:2], key=lambda span: span.status.is_ok is False)
    assert {delivery.headers.get("traceparent") for delivery in deliveries} == {TRACEPARENT, None}
    assert good.name == "publish taskmesh.commands"
    assert (format(good.context.trace_id, "032x"), format(good.parent.span_id, "016x")) == tuple(
        TRACEPARENT.split("-")[1:3]
    )
    assert good.attributes["messaging.rabbitmq.destination.routing_key"] == "billing.invoice.issue"
    assert good.attributes["taskmesh.task.id"] == str(routed.task_id)
    assert good.attributes["taskmesh.outbox.dwell_ms"] >= 0
    assert bad.status.status_code is StatusCode.ERROR
    assert bad.attributes["error.type"] == "returned"


async def test_a_message_that_is_published_again_has_one_span(engine, broker, monkeypatch):
    """The database was lost between the broker's answer and the commit: a trace that began there had two roots."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("test"))
    monkeypatch.setattr(telemetry, "is_exporting", lambda: True)
    await put(engine, command(traceparent=TRACEPARENT))

    class LosesTheDatabaseOnce:
        losses = 0

        async def published(self, connection, rows):
            if not self.losses:
                self.losses += 1
                await connection.execute(text("select pg_terminate_backend(pg_backend_pid())"))

        async def expired(self, connection, rows):
            """Not of this test."""

    hooks = LosesTheDatabaseOnce()
    async with relaying(engine, broker.amqp_url, hooks):
        deliveries = await receive(broker.amqp_url, "billing", 2)
        await _until(engine, lambda rows: rows == [])

    assert hooks.losses == 1
    assert {delivery.headers["traceparent"] for delivery in deliveries} == {TRACEPARENT}
    assert [span.name for span in exporter.get_finished_spans()] == ["publish taskmesh.commands"]


def test_a_listener_s_retry_is_reported_and_the_event_itself_is_not():
    """An event is a task only where somebody listens; see the rows that a listener's retry and an event leave behind."""
    hooks = ServiceHooks("email")
    now = datetime.now(UTC)
    headers, properties, body = celery_protocol.encode(
        TaskMessage(type="billing.document.ready", id=uuid4(), kind=TaskKind.EVENT)
    )

    def row(exchange):
        return OutboxRow(
            id=1, due_at=now, exchange=exchange, routing_key="x", mandatory=True, headers=headers, properties=properties,
            body=body, task_id=None, expires_at=None, created_at=now, failures=0,
        )  # fmt: skip

    assert hooks._event(row(EVENTS), TaskState.QUEUED) is None
    assert hooks._event(row(DIRECT), TaskState.QUEUED).kind is TaskKind.EVENT
