"""The publisher against a real broker: every message gets a true answer, whatever happens on the way."""

from __future__ import annotations

import asyncio
import time

import pika
import pytest
from pika import frame, spec

from taskmesh import publishing, topology
from taskmesh.exchanges import COMMANDS, DEAD, EVENTS, LIFECYCLE
from taskmesh.management import Management
from taskmesh.publishing import Outcome, OutgoingMessage, Publisher
from taskmesh.testing.proxy import TcpProxy

CONFIRMED, RETURNED, REFUSED, UNKNOWN = Outcome


@pytest.fixture(autouse=True)
def _mesh(broker):
    with Management(broker.management_url) as management:
        for wanted in (topology.gateway_topology(), topology.worker_topology("billing", [])):
            topology.declare(wanted, amqp_url=broker.amqp_url, management=management)


@pytest.fixture
def billing_url(broker):
    """The URL of a user with the run-time rights of the billing service."""
    user = broker.vhost
    with Management(broker.management_url) as management:
        management.put_user(user, "pw")
        topology.grant(management, broker.vhost, user, topology.permissions("billing"))
        yield f"amqp://{user}:pw@{broker.amqp_url.rpartition('@')[2]}"
        management.delete_user(user)


def message(key="billing.invoice.issue", exchange=COMMANDS, *, mandatory=True, body=b"{}", headers=None, **properties):
    return OutgoingMessage(
        exchange=exchange, routing_key=key, body=body, headers=headers or {}, properties=properties, mandatory=mandatory
    )


def received(broker, queue="billing"):
    """Every message in the queue, as properties and body."""
    connection = pika.BlockingConnection(pika.URLParameters(broker.amqp_url))
    channel = connection.channel()
    count = channel.queue_declare(queue, passive=True).method.message_count
    found = []
    if count:
        for method, properties, body in channel.consume(queue, inactivity_timeout=10):
            channel.basic_ack(method.delivery_tag)
            found.append((properties, body))
            if len(found) == count:
                break
    connection.close()
    return found


async def test_each_of_many_messages_is_reported_by_itself(broker, billing_url):
    """Routable, unroutable, forbidden, nowhere to be found and impossible ones, mixed in one window."""
    kinds = [
        (lambda n: message(body=b"good %d" % n), CONFIRMED, None),
        (lambda n: message("nobody.invoice.issue"), RETURNED, "NO_ROUTE"),
        (lambda n: message("nobody.invoice.issue", mandatory=False), CONFIRMED, None),
        (lambda n: message(exchange=DEAD), REFUSED, "ACCESS_REFUSED"),
        (lambda n: message("task.running.email", LIFECYCLE), REFUSED, "ACCESS_REFUSED"),
        (lambda n: message("task.running.billing", LIFECYCLE), CONFIRMED, None),
        (lambda n: message(exchange="no.such.exchange"), REFUSED, "ACCESS_REFUSED"),
        (lambda n: message(user_id="somebody else"), REFUSED, "PRECONDITION_FAILED"),
        (lambda n: message("billing." + "x" * 300), REFUSED, "cannot be encoded"),
        (lambda n: message(no_such_property=1), REFUSED, "cannot be encoded"),
        (lambda n: message(headers={"too": 2**80}), REFUSED, "cannot be encoded"),
    ]
    batch = [(kind, kind[0](number)) for number in range(7) for kind in kinds]

    async with Publisher(billing_url, name="test") as publisher:
        reports = await publisher.publish([content for _, content in batch])
        after = await publisher.publish([message()])

    for (_, outcome, reason), report in zip([kind for kind, _ in batch], reports, strict=True):
        assert report.outcome is outcome
        assert reason is None or reason in report.reason
    assert [report.outcome for report in after] == [CONFIRMED]
    assert {body for _, body in received(broker)} >= {b"good %d" % number for number in range(7)}


async def test_a_missing_exchange_is_refused_for_a_user_who_may_do_everything(broker):
    async with Publisher(broker.amqp_url, name="test") as publisher:
        reports = await publisher.publish([message(), message(exchange="no.such.exchange"), message()])

    assert [report.outcome for report in reports] == [CONFIRMED, REFUSED, CONFIRMED]
    assert "NOT_FOUND" in reports[1].reason


async def test_messages_that_share_an_id_are_told_apart(broker):
    """An event's copies, or a task sent twice, have one message id."""
    async with Publisher(broker.amqp_url, name="test") as publisher:
        reports = await publisher.publish(
            [
                message("nobody.x", message_id="one"),
                message("billing.x", message_id="one"),
                message("nobody.x", EVENTS, message_id="one", mandatory=False),
                message("nobody.x", message_id="one"),
                message("billing.x", message_id="one"),
            ]
        )

    assert [report.outcome for report in reports] == [RETURNED, CONFIRMED, CONFIRMED, RETURNED, CONFIRMED]


async def test_a_full_queue_refuses_and_the_rest_is_confirmed(broker):
    with Management(broker.management_url) as management:
        connection = pika.BlockingConnection(pika.URLParameters(broker.amqp_url))
        arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
        connection.channel().queue_declare("full", arguments=arguments)
        connection.channel().queue_bind("full", EVENTS, "full")
        connection.close()
        assert management.bindings(broker.vhost, "full")

    async with Publisher(broker.amqp_url, name="test") as publisher:
        await publisher.publish([message("full", EVENTS)])
        reports = await publisher.publish([message(), message("full", EVENTS), message()])

    assert [report.outcome for report in reports] == [CONFIRMED, REFUSED, CONFIRMED]


async def test_what_is_published_is_persistent_and_keeps_its_properties_and_headers(broker):
    headers = {"id": "7", "retries": 0, "timelimit": [2.5, None], "stamps": {}, "big": 2**40, "on": True}

    async with Publisher(broker.amqp_url, name="test") as publisher:
        await publisher.publish(
            [message(headers=headers, content_type="application/json", priority=3, body="é".encode())]
        )

    [(properties, body)] = received(broker)
    assert properties.headers == headers
    assert (properties.delivery_mode, properties.content_type, properties.priority) == (2, "application/json", 3)
    assert properties.message_id
    assert body.decode() == "é"


async def test_a_cut_connection_leaves_unknown_outcomes_a_bounded_window_and_a_publisher_that_comes_back(broker):
    async with TcpProxy(broker.amqp_url) as proxy, Publisher(proxy.url, name="test", window=10) as publisher:
        await publisher.publish([message()])
        proxy.stall()
        publishing_ = asyncio.create_task(publisher.publish([message(body=b"late")] * 50))
        await asyncio.to_thread(_until_queued, broker, 1 + 10)

        proxy.cut()
        reports = await publishing_
        proxy.resume()
        again = await publisher.publish([message()] * 3)

    assert {report.outcome for report in reports} == {UNKNOWN}
    assert [report.outcome for report in again] == [CONFIRMED] * 3
    assert sum(body == b"late" for _, body in received(broker)) == 10


def _until_queued(broker, count):
    """Return when the queue holds so many messages; asks the queue itself, as management statistics lag."""
    connection = pika.BlockingConnection(pika.URLParameters(broker.amqp_url))
    channel = connection.channel()
    deadline = time.monotonic() + 10
    while channel.queue_declare("billing", passive=True).method.message_count < count:
        assert time.monotonic() < deadline
        connection.process_data_events(time_limit=0.02)
    connection.close()


async def test_a_connection_closed_by_an_operator_leaves_unknown_outcomes(broker):
    async with TcpProxy(broker.amqp_url) as proxy, Publisher(proxy.url, name="doomed") as publisher:
        await publisher.publish([message()])
        with Management(broker.management_url) as management:
            name = await asyncio.to_thread(_connection_name, management, broker.vhost, "doomed")
            proxy.stall()
            publishing_ = asyncio.create_task(publisher.publish([message()] * 5))
            await asyncio.to_thread(_until_queued, broker, 6)

            # The confirms are held back, then lost with what comes after: the broker's goodbye.
            management.close_connection(name)
            proxy.cut()
            reports = await publishing_
        proxy.resume()

        assert {report.outcome for report in reports} == {UNKNOWN}
        assert [report.outcome for report in await publisher.publish([message()])] == [CONFIRMED]


def _connection_name(management, vhost, client_name):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for connection in management.connections(vhost):
            if connection.get("client_properties", {}).get("connection_name") == client_name:
                return connection["name"]
    raise AssertionError("the broker never listed the connection")


async def test_a_silent_broker_is_given_up_after_the_confirm_timeout(broker):
    async with (
        TcpProxy(broker.amqp_url) as proxy,
        Publisher(proxy.url, name="test", confirm_timeout_seconds=0.3) as publisher,
    ):
        await publisher.publish([message()])
        proxy.stall()

        reports = await publisher.publish([message()] * 3)
        proxy.resume()
        again = await publisher.publish([message()])

    assert {report.outcome for report in reports} == {UNKNOWN}
    assert "no confirm within 0.3 s" in reports[0].reason
    assert [report.outcome for report in again] == [CONFIRMED]
    assert proxy.accepted == 2


async def test_a_blocked_connection_is_kept_and_sent_nothing_until_the_broker_reads_again(broker):
    """A new connection would be blocked, too, and each would leave another copy of the messages."""
    async with (
        TcpProxy(broker.amqp_url) as proxy,
        Publisher(proxy.url, name="test", confirm_timeout_seconds=0.3) as publisher,
    ):
        await publisher.publish([message(body=b"before")])
        proxy.inject(frame.Method(0, spec.Connection.Blocked("low on memory")).marshal())
        await asyncio.to_thread(_until_queued, broker, 1)

        blocked = await publisher.publish([message(body=b"blocked")])
        waiting = asyncio.create_task(publisher.publish([message(body=b"after")]))
        proxy.inject(frame.Method(0, spec.Connection.Unblocked()).marshal())
        unblocked = await waiting

    assert [report.outcome for report in blocked] == [UNKNOWN]
    assert "blocks publishers" in blocked[0].reason
    assert [report.outcome for report in unblocked] == [CONFIRMED]
    assert [body for _, body in received(broker)] == [b"before", b"after"]
    assert proxy.accepted == 1


async def test_a_broker_that_is_down_is_unknown_and_then_found_again(broker):
    async with TcpProxy(broker.amqp_url) as proxy, Publisher(proxy.url, name="test") as publisher:
        await proxy.refuse()
        down = await publisher.publish([message()])
        with pytest.raises(publishing.BrokerUnavailable):
            await publisher.connected()

        await proxy.accept()
        up = await publisher.publish([message()])

    assert [report.outcome for report in down + up] == [UNKNOWN, CONFIRMED]


async def test_publishing_nothing_needs_no_broker():
    async with Publisher("amqp://a:b@127.0.0.1:1/x", name="test") as publisher:
        assert await publisher.publish([]) == []
